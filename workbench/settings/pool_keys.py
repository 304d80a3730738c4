"""Varied settings of one pool: ``NAME.key`` of ``--vary``, and what such a point makes of the pools of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.scheduler.handover_settings import DECODE_POOL, PAIRS
from workbench.scheduler.settings import ConfigError, Setting
from workbench.settings.loading import SETTINGS
from workbench.settings.pool_spec import PoolSpec, parse_pools
from workbench.settings.run_settings import check_of_pool

INSTANCES = "instances"
"""Key of how many instances a pool has."""
_COUNT = Setting(INSTANCES, int, False, 1, help="", least=1, unit="instances")


def split_name(name: str) -> tuple[str, str] | None:
    """(the pool, the key) of a setting of a pool; None for one of the run."""
    pool, dot, key = name.partition(".")
    return (pool, key) if dot else None


def declared(name: str) -> Setting:
    """The setting that a varied name stands for. Raises ConfigError for a key that is none of a pool's."""
    of_pool = split_name(name)
    if of_pool is None:
        return SETTINGS[name]
    _, key = of_pool
    if key == INSTANCES:
        return _COUNT
    check_of_pool(key, beside=[INSTANCES])
    return SETTINGS[key]


def is_of_pairs(name: str) -> bool:
    """Tell whether a setting is for pools that prefill or decode alone."""
    return SETTINGS[name].needs in (PAIRS, DECODE_POOL)


def check_names(names: Sequence[str], pools: Sequence[str]) -> None:
    """Raise ConfigError for a varied setting of a pool that is not there, or that has the setting already."""
    specs = {pool.name: pool for pool in parse_pools(pools)}
    for name in names:
        of_pool = split_name(name)
        if of_pool is None:
            continue
        pool, key = of_pool
        if not specs:
            raise ConfigError(f"{name}: there are no pools; give them with --pool")
        if pool not in specs:
            raise ConfigError(f"{name}: no pool is called {pool}; there are {', '.join(specs)}")
        if key in dict(specs[pool].given):
            raise ConfigError(f"{name}: both varied and set; give one of the two")


def pools_at(pools: Sequence[str], point: Mapping[str, Any]) -> tuple[str, ...]:
    """The pools of a run, each as ``--pool`` takes it, with what a point says of them."""
    return tuple(_at(spec, point).text for spec in parse_pools(pools))


def _at(spec: PoolSpec, point: Mapping[str, Any]) -> PoolSpec:
    own = dict(spec.given)
    count = spec.count
    for name, value in point.items():
        of_pool = split_name(name)
        if of_pool is None or of_pool[0] != spec.name:
            continue
        if of_pool[1] == INSTANCES:
            count = value
        else:
            own[of_pool[1]] = _written(value)
    return replace(spec, count=count, given=tuple(own.items()))


def _written(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
