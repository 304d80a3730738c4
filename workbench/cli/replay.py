"""``workbench replay``: a trace on a real model runner, arrivals honoured, to the same record as a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.trace_flags import TraceReading, with_trace_flags

if TYPE_CHECKING:
    from reports.record.run_record import RunRecord
    from traces import Trace
    from workbench.settings.run_settings import RunSettings


@with_trace_flags
def replay(
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    loop: options.Loop = None,
    out: options.Out = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    decisions: options.Decisions = False,
    config: options.Config = None,
    slo_ttft: options.SloTtft = None,
    slo_tpot: options.SloTpot = None,
    seed: options.Seed = None,
    model: options.Model = None,
    backend: Annotated[
        str,
        options.option(
            "--backend", help="auto | cpu | cuda. Default auto: cuda if there is a GPU, else cpu.", panel=options.GPU
        ),
    ] = "auto",
    load_format: options.LoadFormat = "auto",
    tp: options.Tp = None,
    pp: options.Pp = None,
    micro_batches: options.MicroBatches = None,
    dtype: options.Dtype = None,
    mem_fraction: options.MemFraction = None,
    kv_tokens: options.KvTokens = None,
    max_context: options.MaxContext = None,
    cuda_graphs: options.CudaGraphs = None,
    batching: options.Batching = None,
    policy: options.Policy = None,
    page_size: options.PageSize = None,
    cache: options.Cache = None,
    evict: options.Evict = None,
    chunk: options.Chunk = None,
    chunk_depth: options.ChunkDepth = None,
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
    requests: options.Requests = None,
    rate: options.Rate = None,
    speedup: options.Speedup = None,
    concurrency: options.Concurrency = None,
    reading: TraceReading = {},  # noqa: B006  (replaced by the flags of a trace)
) -> None:
    """Run TRACE in real time on a real model, under the same scheduler and loops as `simulate`."""
    given = dict(locals())
    for name in (
        "trace",
        "out",
        "force",
        "as_json",
        "decisions",
        "config",
        "reading",
        "backend",
        "load_format",
    ):
        given.pop(name)
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(trace, out, force, as_json, decisions, config, reading, backend, load_format, given)


def _run(
    path: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    decisions: bool,
    config: Path | None,
    reading: TraceReading,
    backend: str,
    load_format: str,
    flags: dict[str, Any],
) -> None:
    from workbench.cli.runs import open_reshaped, run_and_report, say
    from workbench.cli.waits import SaidWaits
    from workbench.scheduler.config import ConfigError
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from

    try:
        from workbench.cluster.replay import replay_loop
        from workbench.settings.real import check_device_effects, choose_device, device_defaults, runner_options

        device = choose_device(backend)
        say(check_device_effects(flags, config, device))
        settings = settings_from(config, flags, defaults=device_defaults(device))
        say(check_effects(settings, flags, config))
        for name in settings.loops:
            runner_options(settings, name, device, load_format)
    except ModuleNotFoundError as error:
        raise ConfigError(f"a real run needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    trace = open_reshaped(path, reading, settings)

    def run_one(settings: RunSettings, loop: str, trace: Trace, **more: Any) -> RunRecord:
        return replay_loop(settings, loop, trace, device=device, load_format=load_format, waiting=SaidWaits(), **more)

    run_and_report(trace, settings, out, force, as_json, decisions, run_one, "replayed")
