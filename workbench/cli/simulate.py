"""``workbench simulate``: a trace under one or several loops on a modelled GPU, compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options

if TYPE_CHECKING:
    from reports.record import RunRecord
    from traces import Trace
    from workbench.run.settings import RunSettings

_RUN, _GPU, _SHAPE = options.RUN, options.GPU, options.SHAPE
_option = options.option


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)],
    loop: options.Loop = None,
    out: Annotated[Optional[Path], _option("--out", help="Output folder. Default: runs/<trace>, numbered if taken.", panel=_RUN)] = None,
    force: Annotated[bool, _option("--force", help="Replace an earlier run in the output folder.", panel=_RUN)] = False,
    as_json: Annotated[bool, _option("--json", help="Print the numbers as JSON.", panel=_RUN)] = False,
    decisions: Annotated[bool, _option("--decisions", help="Also write decisions.jsonl.", panel=_RUN)] = False,
    like: options.Like = None,
    config: options.Config = None,
    slo_ttft: Annotated[Optional[float], _option("--slo-ttft", help="Seconds; goodput counts requests within it.", panel=_RUN)] = None,
    slo_tpot: Annotated[Optional[float], _option("--slo-tpot", help="Seconds a token; goodput counts requests within it.", panel=_RUN)] = None,
    seed: options.Seed = None,
    engine: options.Engine = None,
    model: options.Model = None,
    gpu: options.Gpu = None,
    tp: options.Tp = None,
    pp: options.Pp = None,
    dp: Annotated[Optional[int], _option("--dp", help="Instances behind a router. Default 1.", panel=_GPU)] = None,
    ep: options.Ep = None,
    router: Annotated[Optional[str], _option("--router", help="round_robin | least_requests | least_tokens | cache_aware.", panel=_GPU)] = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    mem_fraction: options.MemFraction = None,
    kv_tokens: options.KvTokens = None,
    max_context: options.MaxContext = None,
    cuda_graphs: options.CudaGraphs = None,
    cost: options.Cost = None,
    batching: options.Batching = None,
    policy: options.Policy = None,
    page_size: options.PageSize = None,
    cache: options.Cache = None,
    evict: options.Evict = None,
    chunk: options.Chunk = None,
    max_prefill_tokens: options.MaxPrefillTokens = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    max_running: options.MaxRunning = None,
    mixed_chunk: options.MixedChunk = None,
    preempt_threshold: options.PreemptThreshold = None,
    conservativeness: options.Conservativeness = None,
    max_passed_over: options.MaxPassedOver = None,
    max_prefill_streak: options.MaxPrefillStreak = None,
    queue_timeout: options.QueueTimeout = None,
    request_timeout: options.RequestTimeout = None,
    overlap: options.Overlap = None,
    overlap_prefills: options.OverlapPrefills = None,
    ignore_eos: options.IgnoreEos = None,
    max_tokens: options.MaxTokens = None,
    requests: Annotated[Optional[int], _option("--requests", help="Only the first N requests.", panel=_SHAPE)] = None,
    rate: Annotated[Optional[float], _option("--rate", help="Rescale arrivals to this mean rate, requests/s.", panel=_SHAPE)] = None,
    speedup: Annotated[Optional[float], _option("--speedup", help="Divide arrival times by this.", panel=_SHAPE)] = None,
    concurrency: Annotated[Optional[int], _option("--concurrency", help="Closed loop: so many at a time, arrivals ignored.", panel=_SHAPE)] = None,
    format: Annotated[str, _option("--format", help="Trace format. Default: recognised from the content.", panel=_SHAPE)] = "auto",
    tokenizer: Annotated[Optional[Path], _option("--tokenizer", help="tokenizer.json or its folder, for traces of text.", panel=_SHAPE)] = None,
) -> None:  # fmt: skip
    """Replay TRACE under the event loops on a modelled GPU and compare them."""
    given = dict(locals())
    for name in ("trace", "out", "force", "as_json", "decisions", "like", "config", "format", "tokenizer"):
        given.pop(name)
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(trace, out, force, as_json, decisions, like, config, format, tokenizer, given)


def _run(path: Path, out: Path | None, force: bool, as_json: bool, decisions: bool, like: Path | None, config: Path | None,
         format: str, tokenizer: Path | None, flags: dict[str, Any]) -> None:  # fmt: skip
    from reports.record import prepare_out
    from traces import open_trace
    from traces.reshape import reshape
    from workbench.run.settings import resolve, settings_from

    settings = settings_from(config, flags, like)
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
    from reports.metrics import summarise
    from reports.page import write_report
    from reports.table import comparison_table, to_json
    from reports.verdict import verdict

    summaries = {name: summarise(record, settings.slo_ttft, settings.slo_tpot) for name, record in records.items()}
    first = next(iter(records.values()))
    page = folder / "report.html"
    title = f"{first.meta['trace']['name']}: {first.meta['model']} on {first.meta['hardware']['gpu']}"
    write_report(records, page, title, first.meta["command"], settings.slo_ttft, settings.slo_tpot)
    if as_json:
        print(to_json(summaries, {name: folder / name for name in records}, page))
        return
    from rich.console import Console

    console = Console()
    console.print(comparison_table(summaries))
    for line in verdict(summaries):
        console.print(line, highlight=False)
    for note in (*first.meta["trace"]["notes"], *first.meta["cost_notes"]):
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
