"""Instances over time: which were there, what they cost, and what energy they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.metrics.instances import Pool, pools_of
from reports.record.run_record import RunRecord
from reports.record.schema import MODES

SERVING = frozenset({"up", "draining"})
HOUR_S = 3600.0


@dataclass(frozen=True)
class Span:
    """What an instance was from one moment to another: starting, up, draining or down."""

    instance: int
    state: str
    begin_s: float
    end_s: float


def fleet_spans(record: RunRecord) -> list[Span] | None:
    """What the instances of a run were over time; None where all of them were there all along."""
    said = record.meta.get("fleet")
    if not isinstance(said, list | tuple):
        return None
    return [
        Span(int(each["instance"]), str(each["state"]), float(each["begin_s"]), float(each["end_s"]))
        for each in said
        if isinstance(each, Mapping)
    ]


def _of(spans: Iterable[Span], instance: int, begin_s: float, end_s: float) -> list[tuple[Span, float]]:
    """The spans of an instance with the seconds of each between two moments."""
    mine = [span for span in spans if span.instance == instance]
    return [(span, max(min(span.end_s, end_s) - max(span.begin_s, begin_s), 0.0)) for span in mine]


def paid_s(record: RunRecord, instance: int, begin_s: float, end_s: float) -> float:
    """Seconds between two moments in which somebody pays for an instance: while it starts, serves, drains, or is lost and
    not given up."""
    spans = fleet_spans(record)
    if spans is None:
        return end_s - begin_s
    return sum(seconds for _, seconds in _of(spans, instance, begin_s, end_s))


def out_of_service(
    record: RunRecord, instance: int, begin_s: float, end_s: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """When an instance could serve nobody; None where it could all along."""
    spans = fleet_spans(record)
    if spans is None:
        return None
    serving = sorted(
        (span.begin_s, span.end_s) for span in spans if span.instance == instance and span.state in SERVING
    )
    edges = [begin_s, *(edge for span in serving for edge in span), end_s]
    table = np.array(edges).reshape(-1, 2).clip(begin_s, end_s)
    table = table[table[:, 1] > table[:, 0]]
    return table[:, 0], table[:, 1]


@dataclass(frozen=True)
class Use:
    """What some instances took in a run."""

    gpu_s: float
    """Of all GPUs that were paid for."""
    energy_j: float | None
    """None where nobody knows what their GPUs draw."""
    cost: float | None
    """None where nobody knows what they cost."""


def use_of(record: RunRecord, begin_s: float, end_s: float, pool: Pool | None = None) -> Use | None:
    """What the instances of a pool, or all of them, took between two moments; None where nobody knows the GPUs."""
    pools = [pool] if pool is not None else pools_of(record)
    if not pools:
        hardware = record.meta.get("hardware")
        gpus = hardware.get("gpus") if isinstance(hardware, Mapping) else None
        return None if not isinstance(gpus, int) else Use(gpus * (end_s - begin_s), None, None)
    uses = [_of_pool(record, each, begin_s, end_s) for each in pools]
    energies, costs = [use.energy_j for use in uses], [use.cost for use in uses]
    return Use(
        sum(use.gpu_s for use in uses),
        None if None in energies else sum(value for value in energies if value is not None),
        None if None in costs else sum(value for value in costs if value is not None),
    )


def _of_pool(record: RunRecord, pool: Pool, begin_s: float, end_s: float) -> Use:
    each = pool.gpus // pool.count
    gpu_s = each * sum(paid_s(record, number, begin_s, end_s) for number in pool.numbers)
    price = _price(record, pool.gpu)
    return Use(
        gpu_s,
        _energy_j(record, pool, gpu_s, begin_s, end_s),
        None if price is None else price * gpu_s / HOUR_S,
    )


def _price(record: RunRecord, gpu: str) -> float | None:
    prices = record.meta.get("prices")
    found = prices.get("gpu_hour", {}).get(gpu) if isinstance(prices, Mapping) else None
    return float(found) if isinstance(found, int | float) else None


def _energy_j(record: RunRecord, pool: Pool, gpu_s: float, begin_s: float, end_s: float) -> float | None:
    """Joules of a pool's GPUs: each draws by what its stage computes, and less while it waits."""
    watts = pool.power_w
    if watts is None:
        return None
    column = record.iterations
    mine = np.isin(column["instance"], list(pool.numbers))
    seconds = column["end_s"][mine].clip(begin_s, end_s) - column["start_s"][mine].clip(begin_s, end_s)
    by_mode = np.bincount(column["mode"][mine], weights=seconds, minlength=len(MODES))
    busy = {mode: float(by_mode[place]) * pool.tp for place, mode in enumerate(MODES)}
    busy_j = sum(watts.get(mode, watts["prefill"]) * busy_s for mode, busy_s in busy.items())
    return busy_j + watts["idle"] * max(gpu_s - sum(busy.values()), 0.0)


def counts_over_time(record: RunRecord, pool: Pool, begin_s: float, end_s: float) -> list[tuple[float, int]]:
    """How many instances of a pool could serve, from each moment on."""
    spans = fleet_spans(record)
    if spans is None:
        return [(begin_s, pool.count)]
    changes: dict[float, int] = {begin_s: 0}
    for span in spans:
        if span.instance in pool.numbers and span.state in SERVING and span.end_s > begin_s:
            changes[max(span.begin_s, begin_s)] = changes.get(max(span.begin_s, begin_s), 0) + 1
            if span.end_s < end_s:
                changes[span.end_s] = changes.get(span.end_s, 0) - 1
    found: list[tuple[float, int]] = []
    number = 0
    for at_s in sorted(changes):
        number += changes[at_s]
        if not found or found[-1][1] != number:
            found.append((at_s, number))
    return found


def fleet_numbers(record: RunRecord, pool: Pool, begin_s: float, end_s: float) -> dict[str, Any]:
    """What a pool had of instances and took of GPUs: `gpu_hours`, `energy_kwh`, `cost`; and where instances came and went,
    `instances_mean`, `instances_least`, `instances_most` (that could serve), how many were `started` and `lost`."""
    use = _of_pool(record, pool, begin_s, end_s)
    found: dict[str, Any] = {
        "gpu_hours": use.gpu_s / HOUR_S,
        "energy_kwh": None if use.energy_j is None else use.energy_j / 3.6e6,
        "cost": use.cost,
    }
    spans = fleet_spans(record)
    if spans is None:
        return found
    counts = counts_over_time(record, pool, begin_s, end_s)
    ends = [*(at_s for at_s, _ in counts[1:]), end_s]
    area = sum(number * (to_s - at_s) for (at_s, number), to_s in zip(counts, ends, strict=True))
    mine = [span.state for span in spans if span.instance in pool.numbers]
    return found | {
        "instances_mean": area / max(end_s - begin_s, 1e-12),
        "instances_least": min(number for _, number in counts),
        "instances_most": max(number for _, number in counts),
        "started": mine.count("starting"),
        "lost": mine.count("down"),
    }
