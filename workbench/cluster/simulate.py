"""One simulated run: a trace under one loop, to a run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.record.meta import HardwareMeta, RunMeta, Totals
from reports.record.run_record import RunRecord
from traces import Trace
from workbench.clients.bounds import counted
from workbench.cluster.pools import SimulatedPool, gpus_of, modelled, resolve_pools, settings_found
from workbench.cluster.progress import Progress
from workbench.cluster.simulated_world import SimulatedWorld, Watch
from workbench.recording.meta_parts import settings_used, trace_meta, versions
from workbench.recording.of_pools import gpus_in_words
from workbench.recording.recorder import decisions_file
from workbench.recording.trace_notes import trace_notes
from workbench.settings.run_settings import RunSettings


def simulate_loop(
    settings: RunSettings,
    loop: str,
    trace: Trace,
    *,
    trace_sha256: str,
    command: str,
    progress: Progress | None = None,
    decisions: Path | None = None,
    pools: Sequence[SimulatedPool] | None = None,
    watch: Watch | None = None,
    prices: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Run a trace under one loop and return its record; ``meta['interrupted']`` tells whether it was stopped early, from
    the keyboard or by ``watch``. ``pools`` replace what the settings imply; ``prices`` are kept with the record.

    Raises ConfigError, CatalogueError, ModelDoesNotFit or TraceError.
    """
    if pools is None:
        pools = resolve_pools(settings, loop)
    with decisions_file(decisions) as file:
        world = SimulatedWorld(settings, pools, trace, file)
        finished = world.run(progress, watch)
    recorder = world.recorder
    if finished and recorder.by_id:
        raise AssertionError(f"{len(recorder.by_id)} requests never ended: {list(recorder.by_id)[:3]}")
    of_all, of_each = modelled(pools)
    notes, fleet, over_s = trace_notes(settings, recorder.rows), None, world.env.now
    if world.fleet is not None:
        over_s = recorder.over_s if finished else over_s
        notes, fleet = [*notes, *world.fleet.notes], world.fleet.spans(over_s)
    meta = RunMeta(
        kind="simulated",
        name=loop,
        command=command,
        trace=trace_meta(trace, trace_sha256, notes),
        model=pools[0].recipe.model.name,
        hardware=HardwareMeta(gpus_in_words(gpus_of(pools)), sum(pool.gpus for pool in pools), simulated=True),
        settings=settings_used(settings, **settings_found(pools)),
        versions=versions("simpy"),
        interrupted=not finished,
        totals=Totals(
            requests=len(recorder.rows),
            ended=recorder.done,
            iterations=len(recorder.iterations),
            cut=counted(recorder.cuts),
            simulated_s=round(over_s, 9),
        ),
        prices=prices,
        fleet=fleet,
        pools=[pool.described(more) for pool, more in zip(pools, of_each, strict=True)],
        **of_all,
    )
    return recorder.record(meta)
