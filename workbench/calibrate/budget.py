"""The budget of a difference between two runs: where it comes from.

Run B is simulated again, first with A's step times, then with A's CPU phases too, then with A's KV capacity too. What
each of them takes off the difference is its share; what is left is scheduling, and whatever neither record holds. A
record without iterations (most measured ones) has no step times to lend, and then this says what cannot be told apart
instead. Either way, where GPUs work together, B is simulated with another link between them (link_effect.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.cost.models.fitted import FittedCost
from backends.simulated.host_fit import fit_host
from reports.compare.comparison import compare
from reports.record.run_record import RunRecord
from traces import Trace
from workbench.calibrate.fit import fit_stages, host_columns
from workbench.calibrate.link_effect import METRICS, link_effect
from workbench.clients.trace_input import open_as, reshaped
from workbench.cluster.pools import SimulatedPool, resolve_pools
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.settings.loading import recorded_settings
from workbench.settings.run_settings import RunSettings


class ReplayedCost:
    """A's measured step times: those of the same step where the batch is the same, else the fit to all of them."""

    def __init__(self, record: RunRecord, fitted: FittedCost) -> None:
        self._fitted = fitted
        columns = record.iterations
        seconds = columns["end_s"] - columns["start_s"]
        keys = zip(
            columns["iteration"].tolist(),
            columns["stage"].tolist(),
            columns["prefill_tokens"].tolist(),
            columns["decode_tokens"].tolist(),
            columns["context_tokens"].tolist(),
            strict=True,
        )
        self._measured = dict(zip(keys, seconds.tolist(), strict=True))
        self.replayed = self.estimated = 0

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        key = (batch.step, stage, batch.prefill_tokens, batch.decode_tokens, batch.context_tokens)
        seconds = self._measured.get(key)
        if seconds is not None:
            self.replayed += 1
            return seconds
        self.estimated += 1
        return self._fitted.forward(batch, stage)

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return self._fitted.transfer_s(batch, stage)


def error_budget(
    a: RunRecord, b: RunRecord, origin: str, trace_path: Path | None, reading: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Shares of the difference, as errors of the mean latencies before and after each replacement, and as sentences; under
    ``links`` what they would be with another link, where GPUs of B work together.

    `reading` says how the trace is to be read: fields of :class:`traces.trace.ReadAs`.
    """
    again = None
    if trace_path is not None and (b.meta.get("hardware") or {}).get("simulated"):
        again = _Again.of(b, trace_path, reading or {})
    found = _budget(a, b, origin, again)
    if again is not None:
        now = _errors(a, b, origin)
        links = link_effect(a, again.settings, again.pool, now, lambda other: _errors(a, again.simulate(other), origin))
        if links:
            found = {**found, "links": links, "lines": [*found["lines"], *links["lines"]]}
    return found


@dataclass(frozen=True)
class _Again:
    """What it takes to simulate a run again."""

    settings: RunSettings
    trace: Trace
    pool: SimulatedPool
    """The first of its pools."""

    @classmethod
    def of(cls, record: RunRecord, trace_path: Path, reading: dict[str, Any]) -> _Again:
        """The settings of a record, and its trace read anew."""
        settings = RunSettings(**recorded_settings(record.meta, f"the record of {record.name}"))
        opened = open_as(trace_path, reading, ordered=settings.concurrency is None, seed=settings.seed)
        return cls(settings, reshaped(opened, settings), resolve_pools(settings, settings.loops[0])[0])

    def simulate(self, settings: RunSettings, pools: list[SimulatedPool] | None = None) -> RunRecord:
        """Run it with these settings, and on these pools where they are given."""
        from workbench.cluster.simulate import simulate_loop

        return simulate_loop(settings, settings.loops[0], self.trace, trace_sha256="", command="", pools=pools)


def _budget(a: RunRecord, b: RunRecord, origin: str, again: _Again | None) -> dict[str, Any]:
    """The shares themselves."""
    reason = _cannot(a, b, again is not None)
    if reason is not None or again is None:
        return {"separable": False, "lines": [f"error budget: {reason}", *_what_is_known(a, b, origin)]}
    settings, pool = again.settings, again.pool
    built = pool.recipe
    if built.lock_step:
        said = "error budget: ranks that step together cannot be run again with step times measured one by one"
        return {"separable": False, "lines": [said, *_what_is_known(a, b, origin)]}
    fits = fit_stages(a, a.name)
    host, _ = fit_host(*host_columns(a.iterations, a.requests))
    fitted = FittedCost([fit.coefficients for fit in fits], built.model, built.gpu, built.tp)
    steps: list[tuple[str, dict[str, Any]]] = [("step times", {"cost": ReplayedCost(a, fitted)})]
    if any(np.nansum(a.iterations[name]) > 0 for name in ("schedule_s", "launch_host_s", "process_s")):
        changed: dict[str, Any] = {**host}
        steps.append(("CPU phases", {"host": dataclasses.replace(built.host, **changed)}))
    capacity = (a.meta.get("settings") or {}).get("kv_tokens")
    if capacity and capacity != built.scheduler.kv_tokens:
        steps.append(("KV capacity", {"kv_tokens": int(capacity)}))
    errors = [_errors(a, b, origin)]
    applied: dict[str, Any] = {}
    parts: list[dict[str, Any]] = []
    for name, change in steps:
        applied |= change
        instance = dataclasses.replace(built, cost=applied["cost"])
        if "host" in applied:
            instance = dataclasses.replace(instance, host=applied["host"])
        if "kv_tokens" in applied:
            tokens = applied["kv_tokens"]
            scheduler = dataclasses.replace(
                instance.scheduler, kv_tokens=tokens, max_context=min(instance.scheduler.max_context, tokens + 1)
            )
            instance = dataclasses.replace(instance, scheduler=scheduler)
        changed_pool = dataclasses.replace(pool, recipe=instance)
        record = again.simulate(settings, [changed_pool])
        errors.append(_errors(a, record, origin))
        parts.append({"part": name, **{metric: _less(errors[-2][metric], errors[-1][metric]) for metric in METRICS}})
    parts.append({"part": "scheduling and the rest", **errors[-1]})
    replayed = applied["cost"]
    share = replayed.replayed / max(replayed.replayed + replayed.estimated, 1)
    lines = [f"error budget, in points of the error of the mean ({share:.0%} of the steps replayed as measured):"]
    lines += [
        "  " + f"{part['part']:24}" + "  ".join(f"{metric.upper()} {_points(part[metric])}" for metric in METRICS)
        for part in parts
    ]
    return {"separable": True, "parts": parts, "replayed_share": share, "lines": lines}


def _cannot(a: RunRecord, b: RunRecord, traced: bool) -> str | None:
    if not len(a.iterations["start_s"]):
        return "A has no iterations, so step time, CPU phases and scheduling cannot be told apart"
    if not (b.meta.get("hardware") or {}).get("simulated"):
        return "B was not simulated, so it cannot be run again with the step times of A"
    for name, record in (("A", a), ("B", b)):
        if len(record.meta.get("pools") or ()) > 1:
            return f"{name} has several pools, whose step times are not those of one kind of instance"
    if not traced:
        return "give --trace to simulate B again with the step times of A"
    return None


def _what_is_known(a: RunRecord, b: RunRecord, origin: str) -> list[str]:
    """Return what two records tell without running anything again: which part of the latency the difference sits in."""
    found = compare(a, b, origin).latencies
    if "ttft" not in found or "e2e" not in found:
        return []

    first, whole = found["ttft"].mean_difference_s, found["e2e"].mean_difference_s
    queue = found["queue"].mean_difference_s if "queue" in found else None
    until_first = (
        f"{first:+.3f} s are the first token"
        if queue is None  # who only watched a server does not know
        else f"{queue:+.3f} s are queueing, {first - queue:+.3f} s from the first batch to the first token"
    )
    return [f"  of the {whole:+.3f} s in mean E2E, {until_first}, {whole - first:+.3f} s decoding"]


def _errors(a: RunRecord, b: RunRecord, origin: str) -> dict[str, float | None]:
    found = compare(a, b, origin).latencies
    return {name: found[name].mean if name in found else None for name in METRICS}


def _less(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
