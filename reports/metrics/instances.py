"""The kinds of instances that a run had, for runs whose instances are not all alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.record.run_record import RunRecord


@dataclass(frozen=True)
class Pool:
    """Instances of one kind, numbered from ``first``."""

    name: str
    first: int
    count: int
    stages: int
    gpu: str
    gpus: int
    """Of all its instances."""
    loop: str
    role: str = "both"
    """both, prefill or decode."""
    tp: int = 1
    """GPUs that are one stage together."""
    kv_tokens: int = 0
    max_running: int = 0
    """Of one instance; both 0 where the record does not say."""
    power_w: Mapping[str, float] | None = None
    """What a GPU draws: `idle`, `prefill` and `decode`; None where nobody knows."""

    @property
    def numbers(self) -> range:
        """Of its instances."""
        return range(self.first, self.first + self.count)


def pools_of(record: RunRecord) -> list[Pool]:
    """The pools of a run; none where its record does not tell them."""
    found = []
    of_run = record.meta.get("settings") or {}
    for said in record.meta.get("pools") or ():
        if isinstance(said, Mapping):
            own = said.get("settings") or {}
            count = _number(said, "count")
            found.append(
                Pool(
                    str(said.get("name", "")),
                    int(said.get("first_instance") or 0),
                    count,
                    _number(said, "pp"),
                    str(said.get("gpu", "")),
                    count * _number(said, "gpus"),
                    str(said.get("loop", "")),
                    str(said.get("role") or "both"),
                    _number(said, "tp"),
                    int(said.get("kv_tokens") or 0),
                    int(own.get("max_running") or of_run.get("max_running") or 0),
                    said.get("power_w"),
                )
            )
    return found


def _number(said: Mapping[str, Any], name: str) -> int:
    return max(int(said.get(name) or 1), 1)


def pool_of(record: RunRecord, instance: int) -> Pool | None:
    """The pool that an instance is of; None where the record does not tell."""
    return next((pool for pool in pools_of(record) if instance in pool.numbers), None)


def stages_each(record: RunRecord) -> tuple[int, ...]:
    """How many stages each instance has, by its number: as the pools say, else as the settings do; never fewer than it has
    rows of. An instance that the router never chose has no rows, and is there all the same."""
    settings = record.meta.get("settings") or {}
    stages = [pool.stages for pool in pools_of(record) for _ in range(pool.count)]
    stages = stages or [max(int(settings.get("pp") or 1), 1)] * max(int(settings.get("dp") or 1), 1)
    column = record.iterations
    alike = stages[-1]
    stages += [alike] * (int(column["instance"].max(initial=0)) + 1 - len(stages))
    seen = np.array(stages)
    np.maximum.at(seen, column["instance"], column["stage"] + 1)
    return tuple(seen.tolist())


def capacity_of(record: RunRecord, name: str) -> np.ndarray:
    """`kv_tokens` or `max_running` of every instance by its number: as the pools say, else as the settings do."""
    said = (record.meta.get("settings") or {}).get(name) or 0
    values = [getattr(pool, name) or said for pool in pools_of(record) for _ in pool.numbers]
    return np.array((values + [said] * len(stages_each(record)))[: max(len(stages_each(record)), 1)])


def stage_weights(record: RunRecord) -> tuple[int, tuple[float, ...]]:
    """How many GPUs the smallest stage is made of, and how many times as many a stage of each instance is, by its number:
    where pools differ in that, a second of one is not a second of another."""
    settings = record.meta.get("settings") or {}
    each = [pool.tp for pool in pools_of(record) for _ in pool.numbers]
    if not each:
        return max(int(settings.get("tp") or 1), 1), (1.0,) * len(stages_each(record))
    least = min(each)
    weights = [tp / least for tp in each]
    return least, tuple(weights + [1.0] * (len(stages_each(record)) - len(weights)))


def instance_names(record: RunRecord) -> dict[int, str]:
    """What to call the instances of several pools, by number: the pool's name and a number in it, from 0."""
    pools = pools_of(record)
    if len(pools) < 2:
        return {}
    return {pool.first + place: f"{pool.name} {place}" for pool in pools for place in range(pool.count)}
