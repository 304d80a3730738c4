"""``workbench simulate``: a trace under one or several loops on a modelled GPU, compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.trace_flags import TraceReading, with_trace_flags

if TYPE_CHECKING:
    from reports.record.run_record import RunRecord
    from traces import Trace
    from workbench.settings.run_settings import RunSettings


@with_trace_flags
def simulate(
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    loop: options.Loop = None,
    out: options.Out = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    decisions: options.Decisions = False,
    like: options.Like = None,
    config: options.Config = None,
    slo_ttft: options.SloTtft = None,
    slo_tpot: options.SloTpot = None,
    seed: options.Seed = None,
    exact: options.Exact = None,
    engine: options.Engine = None,
    model: options.Model = None,
    gpu: options.Gpu = None,
    tp: options.Tp = None,
    pp: options.Pp = None,
    micro_batches: options.MicroBatches = None,
    dp: Annotated[
        Optional[int], options.option("--dp", help="Instances behind a router. Default 1.", panel=options.GPU)
    ] = None,
    ep: options.Ep = None,
    router: Annotated[
        Optional[str],
        options.option(
            "--router", help="round_robin | least_requests | least_tokens | cache_aware.", panel=options.GPU
        ),
    ] = None,
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
    """Replay TRACE under the event loops on a modelled GPU and compare them."""
    given = dict(locals())
    for name in ("trace", "out", "force", "as_json", "decisions", "like", "config", "reading"):
        given.pop(name)
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(trace, out, force, as_json, decisions, like, config, reading, given)


def _run(
    path: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    decisions: bool,
    like: Path | None,
    config: Path | None,
    reading: TraceReading,
    flags: dict[str, Any],
) -> None:
    from workbench.cli.runs import open_reshaped, run_and_report, say
    from workbench.cluster.resolve import resolve
    from workbench.cluster.simulate import simulate_loop
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from

    settings = settings_from(config, flags, like)
    say(check_effects(settings, flags, config))
    instances = {}
    for name in settings.loops:
        # Everything that can be wrong is wrong before the first second is spent.
        instances[name] = resolve(settings, name)
    trace = open_reshaped(path, reading, settings)

    def run_one(settings: RunSettings, loop: str, trace: Trace, **more: Any) -> RunRecord:
        return simulate_loop(settings, loop, trace, instance=instances[loop], **more)

    run_and_report(trace, settings, out, force, as_json, decisions, run_one, "simulated")
