"""``workbench simulate``: a trace under one or several loops on a modelled GPU, compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from reports.record import RunRecord
    from traces import Trace
    from workbench.run.settings import RunSettings

_RUN, _SCHED, _GPU, _SHAPE = "Run", "Scheduler", "Model and hardware", "Trace"


def _option(*names: str, help: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)],
    loop: Annotated[Optional[str], _option("--loop", help="normal, overlap, pipeline, or a comma list to compare. Default: pipeline if pp > 1, else overlap.", panel=_RUN)] = None,
    out: Annotated[Optional[Path], _option("--out", help="Output folder. Default: runs/<trace>, numbered if taken.", panel=_RUN)] = None,
    force: Annotated[bool, _option("--force", help="Replace an earlier run in the output folder.", panel=_RUN)] = False,
    as_json: Annotated[bool, _option("--json", help="Print the numbers as JSON.", panel=_RUN)] = False,
    decisions: Annotated[bool, _option("--decisions", help="Also write decisions.jsonl.", panel=_RUN)] = False,
    config: Annotated[Optional[Path], _option("--config", help="TOML file of settings; flags win.", panel=_RUN)] = None,
    slo_ttft: Annotated[Optional[float], _option("--slo-ttft", help="Seconds; goodput counts requests within it.", panel=_RUN)] = None,
    slo_tpot: Annotated[Optional[float], _option("--slo-tpot", help="Seconds a token; goodput counts requests within it.", panel=_RUN)] = None,
    seed: Annotated[Optional[int], _option("--seed", help="Seed of everything random. Default 0.", panel=_RUN)] = None,
    model: Annotated[Optional[str], _option("--model", help="Hugging Face id of the catalogue, folder, or config.json. Default meta-llama/Llama-3.1-8B.", panel=_GPU)] = None,
    gpu: Annotated[Optional[str], _option("--gpu", help="GPU of the catalogue or a TOML file. Default h100.", panel=_GPU)] = None,
    tp: Annotated[Optional[int], _option("--tp", help="Tensor parallel GPUs. Default 1.", panel=_GPU)] = None,
    pp: Annotated[Optional[int], _option("--pp", help="Pipeline stages. Default 1.", panel=_GPU)] = None,
    dp: Annotated[Optional[int], _option("--dp", help="Instances behind a router. Default 1.", panel=_GPU)] = None,
    ep: Annotated[Optional[int], _option("--ep", help="Expert parallel GPUs (equal to tp). Default 1.", panel=_GPU)] = None,
    router: Annotated[Optional[str], _option("--router", help="round_robin | least_requests | least_tokens | cache_aware.", panel=_GPU)] = None,
    dtype: Annotated[Optional[str], _option("--dtype", help="Weights: bf16 | fp16 | fp32 | fp8 | int4. Default bf16.", panel=_GPU)] = None,
    kv_dtype: Annotated[Optional[str], _option("--kv-dtype", help="KV cache: bf16 | fp16 | fp8. Default bf16.", panel=_GPU)] = None,
    mem_fraction: Annotated[Optional[float], _option("--mem-fraction", help="Share of GPU memory to use. Default 0.9.", panel=_GPU)] = None,
    kv_tokens: Annotated[Optional[int], _option("--kv-tokens", help="KV capacity in tokens. Default: found from memory.", panel=_GPU)] = None,
    max_context: Annotated[Optional[int], _option("--max-context", help="Longest sequence. Default: the model's.", panel=_GPU)] = None,
    cuda_graphs: Annotated[Optional[bool], _option("--cuda-graphs/--no-cuda-graphs", help="Decode in captured graphs. Default on.", panel=_GPU)] = None,
    cost: Annotated[Optional[str], _option("--cost", help="Cost model: roofline.", panel=_GPU)] = None,
    batching: Annotated[Optional[str], _option("--batching", help="prefill-first | mixed. Default prefill-first.", panel=_SCHED)] = None,
    policy: Annotated[Optional[str], _option("--policy", help="fcfs | lpm | dfs-weight | lof | sjf | edf | random | priority | module:Class. Default fcfs.", panel=_SCHED)] = None,
    page_size: Annotated[Optional[int], _option("--page-size", help="Tokens a KV page. Default 1.", panel=_SCHED)] = None,
    cache: Annotated[Optional[str], _option("--cache", help="Prefix cache: radix | none. Default radix.", panel=_SCHED)] = None,
    evict: Annotated[Optional[str], _option("--evict", help="lru | lfu | fifo. Default lru.", panel=_SCHED)] = None,
    chunk: Annotated[Optional[int], _option("--chunk", help="Prompt tokens of a prefill batch; 0: prompts whole. Default 8192.", panel=_SCHED)] = None,
    max_prefill_tokens: Annotated[Optional[int], _option("--max-prefill-tokens", help="Default 16384.", panel=_SCHED)] = None,
    max_batch_tokens: Annotated[Optional[int], _option("--max-batch-tokens", help="Token budget of a step (mixed). Default 2048.", panel=_SCHED)] = None,
    max_running: Annotated[Optional[int], _option("--max-running", help="Requests running at a time. Default 256.", panel=_SCHED)] = None,
    mixed_chunk: Annotated[Optional[bool], _option("--mixed-chunk/--no-mixed-chunk", help="Decodes join prefill batches (prefill-first).", panel=_SCHED)] = None,
    preempt_threshold: Annotated[Optional[int], _option("--preempt-threshold", help="Priority difference that preempts. Default: none does.", panel=_SCHED)] = None,
    conservativeness: Annotated[Optional[float], _option("--conservativeness", help="Scales the expected output share. Default 1.", panel=_SCHED)] = None,
    max_passed_over: Annotated[Optional[int], _option("--max-passed-over", help="Aging bound, in prefill batches. Default 64.", panel=_SCHED)] = None,
    max_prefill_streak: Annotated[Optional[int], _option("--max-prefill-streak", help="Prefills in a row while decodes wait. Default: no bound.", panel=_SCHED)] = None,
    queue_timeout: Annotated[Optional[float], _option("--queue-timeout", help="Seconds a request may wait unscheduled.", panel=_SCHED)] = None,
    request_timeout: Annotated[Optional[float], _option("--request-timeout", help="Seconds a request may take.", panel=_SCHED)] = None,
    overlap: Annotated[Optional[bool], _option("--overlap/--no-overlap", help="Whether the loop chosen without --loop overlaps.", panel=_SCHED)] = None,
    overlap_prefills: Annotated[Optional[bool], _option("--overlap-prefills/--no-overlap-prefills", help="Overlap two prefills in a row. Default on.", panel=_SCHED)] = None,
    ignore_eos: Annotated[Optional[bool], _option("--ignore-eos/--no-ignore-eos", help="Output lengths are known to the scheduler.", panel=_SHAPE)] = None,
    max_tokens: Annotated[Optional[int], _option("--max-tokens", help="Output bound of requests that have none. Default 4096.", panel=_SHAPE)] = None,
    requests: Annotated[Optional[int], _option("--requests", help="Only the first N requests.", panel=_SHAPE)] = None,
    rate: Annotated[Optional[float], _option("--rate", help="Rescale arrivals to this mean rate, requests/s.", panel=_SHAPE)] = None,
    speedup: Annotated[Optional[float], _option("--speedup", help="Divide arrival times by this.", panel=_SHAPE)] = None,
    concurrency: Annotated[Optional[int], _option("--concurrency", help="Closed loop: so many at a time, arrivals ignored.", panel=_SHAPE)] = None,
    format: Annotated[str, _option("--format", help="Trace format. Default: recognised from the content.", panel=_SHAPE)] = "auto",
    tokenizer: Annotated[Optional[Path], _option("--tokenizer", help="tokenizer.json or its folder, for traces of text.", panel=_SHAPE)] = None,
) -> None:  # fmt: skip
    """Replay TRACE under the event loops on a modelled GPU and compare them."""
    given = dict(locals())
    for name in ("trace", "out", "force", "as_json", "decisions", "config", "format", "tokenizer"):
        given.pop(name)
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(trace, out, force, as_json, decisions, config, format, tokenizer, given)


def _run(path: Path, out: Path | None, force: bool, as_json: bool, decisions: bool, config: Path | None, format: str,
         tokenizer: Path | None, flags: dict[str, Any]) -> None:  # fmt: skip
    from reports.record import prepare_out
    from traces import open_trace
    from traces.reshape import reshape
    from workbench.run.settings import resolve, settings_from

    settings = settings_from(config, flags)
    for name in settings.loops:
        resolve(settings, name)  # everything that can be wrong is wrong before the first second is spent
    trace = open_trace(path, format, tokenizer)
    if settings.rate is not None or settings.speedup is not None or settings.requests is not None:
        trace = reshape(trace, settings.rate, settings.speedup, settings.requests, settings.seed)
    folder = out if out is not None else _free_folder(Path("runs") / trace.info.name)
    prepare_out(folder, force)
    try:
        records, interrupted = _simulate_all(trace, settings, folder, decisions, quiet=as_json)
    except Exception:
        _clear_leftovers(folder)
        raise
    _report(records, folder, settings, as_json)
    if interrupted:
        print(f"interrupted: what was simulated is in {folder}", file=sys.stderr)
        raise typer.Exit(130)
    lost = _rejected(records)
    if lost:
        print(lost, file=sys.stderr)
        raise typer.Exit(2)


def _simulate_all(trace: Trace, settings: RunSettings, folder: Path, decisions: bool,
                  quiet: bool) -> tuple[dict[str, RunRecord], bool]:  # fmt: skip
    """Run every loop and write its record. Stops after an interrupt, keeping what there is."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from reports.record import write_record
    from workbench.run.simulate import simulate_loop

    command = " ".join(["workbench", *sys.argv[1:]])
    sha256 = trace.sha256()
    records: dict[str, RunRecord] = {}
    columns = (
        SpinnerColumn(), TextColumn("{task.description:8}"), TextColumn("{task.fields[done]:,} requests"),
        TextColumn("{task.fields[simulated]} simulated"), TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        for name in settings.loops:
            task = bar.add_task(name, total=None, done=0, simulated="0 s", speed="")
            update = _progress(bar, task)
            file = folder / f".{name}.decisions.jsonl" if decisions else None
            if file is not None:
                folder.mkdir(parents=True, exist_ok=True)
            record = simulate_loop(
                settings, name, trace, trace_sha256=sha256, command=command, progress=update, decisions=file
            )
            update(
                record.meta["totals"]["simulated_s"],
                record.meta["totals"]["ended"],
                record.meta["totals"]["iterations"],
            )
            bar.update(task, total=1, completed=1)
            write_record(record, folder / name, {"decisions.jsonl": file} if file is not None else None)
            records[name] = record
            if record.meta["interrupted"]:
                return records, True
    return records, False


def _progress(bar: Any, task: Any) -> Any:
    import time

    began = time.monotonic()

    def update(simulated_s: float, done: int, iterations: int) -> None:
        wall_s = max(time.monotonic() - began, 1e-9)
        speed = f"{simulated_s / wall_s:,.0f}x real time, {iterations / wall_s:,.0f} its/s"
        bar.update(task, done=done, simulated=f"{simulated_s:,.1f} s", speed=speed)

    return update


def _report(records: dict[str, RunRecord], folder: Path, settings: RunSettings, as_json: bool) -> None:
    from reports.page import write_report
    from reports.table import comparison_table, to_json
    from reports.verdict import verdict

    first = next(iter(records.values()))
    page = folder / "report.html"
    title = f"{first.meta['trace']['name']}: {first.meta['model']} on {first.meta['hardware']['gpu']}"
    made = write_report(records, page, title, first.meta["command"], settings.slo_ttft, settings.slo_tpot)
    summaries = made.summaries
    if as_json:
        print(to_json(summaries, {name: folder / name for name in records}, page, made.uses))
        return
    from rich.console import Console

    console = Console()
    console.print(comparison_table(summaries))
    for line in verdict(summaries, made.uses):
        console.print(line, highlight=False)
    for note in first.meta["trace"]["notes"]:
        console.print(f"note: {note}", highlight=False, style="dim")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _free_folder(folder: Path) -> Path:
    """``folder``, or with the first number that makes it new."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _clear_leftovers(folder: Path) -> None:
    """After a failure: no half-written file, and no folder that holds nothing."""
    if folder.is_dir():
        for file in folder.glob(".*.decisions.jsonl"):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _rejected(records: dict[str, RunRecord]) -> str | None:
    """One line about requests that could never be served, or None."""
    for name, record in records.items():
        lost = [i for i, status in enumerate(record.requests["status"]) if status.startswith("rejected")]
        if lost:
            requests = record.requests
            return (
                f"error: {len(lost)} of {len(requests['status'])} requests can never be served under {name}: "
                f"{requests['request_id'][lost[0]]} with {requests['input_tokens'][lost[0]]} input tokens is "
                f"{requests['status'][lost[0]].removeprefix('rejected:')} "
                f"(kv_tokens {record.meta['settings']['kv_tokens']}, max_context {record.meta['settings']['max_context']})"
            )
    return None
