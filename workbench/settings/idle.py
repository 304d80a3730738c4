"""Settings that would do nothing in a run: refused where a flag gives them, noted where a file does.

What a setting takes to act is declared with it. Only what somebody gave is looked at: presets, records and defaults set what
they like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.roles import ROLES
from workbench.scheduler.config import ConfigError, SchedulerConfig
from workbench.scheduler.handover_settings import IDLE_IN_ROLE
from workbench.scheduler.settings import settings_of
from workbench.settings.loading import SETTINGS, read_settings_file, renamed_in
from workbench.settings.pool_spec import parse_pools
from workbench.settings.run_settings import RUN_WIDE, PoolSettings, RunSettings

_DECLARED = {**settings_of(SchedulerConfig), **SETTINGS}


def needs(name: str) -> str | None:
    """What a setting, or ``POOL.setting``, takes to act, None if it always does, beside pools that do not say it
    themselves."""
    name = name.rpartition(".")[2]
    return _DECLARED[name].needs or None if name in _DECLARED else None


def acts(settings: RunSettings, loop: str, name: str) -> bool:
    """Whether a setting has an effect on a run under ``loop``, or on a pool that has ``settings``: of a run with pools, on
    one that does not say it itself; ``POOL.setting`` on that pool."""
    of_pool, _, key = name.rpartition(".")
    if of_pool and key in _DECLARED:
        return any(_acts_in(pool, key) for pool in settings.pools(loop) if pool.name == of_pool)
    if name not in _DECLARED:
        return True
    if not settings.pool or name in RUN_WIDE:
        return _acts_in(PoolSettings("", settings.role, settings.dp, settings, loop), name)
    return any(name not in pool.given and _acts_in(pool, name) for pool in settings.pools(loop))


def _acts_in(pool: PoolSettings, name: str) -> bool:
    """Tell whether a setting has an effect on the instances of a pool."""
    idle = IDLE_IN_ROLE.get(pool.role, frozenset())
    return name not in idle and _DECLARED[name].acts(pool.settings, pool.loop) and not _needs_decode_cache(pool, name)


def _needs_decode_cache(pool: PoolSettings, name: str) -> bool:
    """Tell whether a setting is of a prefix cache that the instances of a decode pool do not keep."""
    if pool.role != "decode" or pool.settings.decode_cache:
        return False
    without = replace(pool.settings, cache="none")
    declared = _DECLARED[name]
    return name == "cache" or (declared.acts(pool.settings, pool.loop) and not declared.acts(without, pool.loop))


def _missing(pools: Sequence[PoolSettings], name: str) -> str | None:
    """What a setting, or ``POOL.setting``, takes to act that does nothing in these pools."""
    of_pool, _, name = name.rpartition(".")
    if of_pool:
        pools = [pool for pool in pools if pool.name == of_pool]
    if any(_needs_decode_cache(pool, name) for pool in pools):
        return "decode_cache"
    return _roles_for(pools, name) or needs(name)


def _roles_for(pools: Iterable[PoolSettings], name: str) -> str | None:
    """What a setting takes to act, where it is the role of these pools that it does nothing in."""
    if any(
        name in IDLE_IN_ROLE.get(pool.role, ()) and _DECLARED[name].acts(pool.settings, pool.loop) for pool in pools
    ):
        roles = [role for role in ROLES if name not in IDLE_IN_ROLE.get(role, ())]
        return f"a pool of role {' or '.join(roles)}"
    return None


def _own_everywhere(settings: RunSettings, loop: str, name: str) -> bool:
    """Tell whether every pool says the setting itself."""
    return (
        bool(settings.pool)
        and name not in RUN_WIDE
        and "." not in name
        and all(name in pool.given for pool in settings.pools(loop))
    )


def idle_in(
    runs: Iterable[tuple[RunSettings, str]], names: Iterable[str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Find which settings act in no run, with what they need, and those that act in some, with the loops of
    the others."""
    runs = list(runs)
    never: dict[str, str] = {}
    partly: dict[str, list[str]] = {}
    for name in names:
        without = [loop for settings, loop in runs if not acts(settings, loop, name)]
        if runs and len(without) == len(runs):
            own = all(_own_everywhere(settings, loop, name) for settings, loop in runs)
            pools = [pool for settings, loop in runs if settings.pool for pool in settings.pools(loop)]
            missing = None if own or name in RUN_WIDE else _missing(pools, name)
            never[name] = missing or (needs(name) if name in RUN_WIDE else None) or "a pool that does not say it itself"
        elif without:
            partly[name] = list(dict.fromkeys(without))
    return never, partly


def check_effects(settings: RunSettings, flags: Mapping[str, Any], config: Path | None) -> list[str]:
    """Notes on settings of the file ``config`` that do nothing, and on flags that act under some of the loops alone.

    Raises ConfigError for a flag (one that is not None) that would do nothing at all.
    """
    runs = [(settings, loop) for loop in settings.loops]
    given = [name for name, value in flags.items() if value is not None]
    file = read_settings_file(config) if config is not None else {}
    written = [name for name in file if name not in given]
    for idle in _idle_in_pools(settings, flags.get("pool")):
        raise ConfigError(idle)
    never, partly = idle_in(runs, given)
    for name, missing in never.items():
        raise ConfigError(f"{name}: has no effect here: it needs {missing}")
    never, more = idle_in(runs, written)
    partly |= more
    notes = renamed_in(config)
    notes += [f"{config}: {idle}" for idle in _idle_in_pools(settings, file.get("pool") if "pool" in written else None)]
    notes += [f"{config}: {name}: has no effect here: it needs {missing}" for name, missing in never.items()]
    return notes + [
        f"{name}: has no effect under {', '.join(loops)}: it needs {needs(name)}" for name, loops in partly.items()
    ]


def _idle_in_pools(settings: RunSettings, said: Sequence[str] | None) -> Iterator[str]:
    """Say which of a pool's own settings do nothing there."""
    if not said or not settings.pool:  # a number of instances took their place
        return
    for number, spec in enumerate(parse_pools(said)):
        pools = [settings.pools(loop)[number] for loop in settings.loops]
        for name, _ in spec.given:
            if not any(_acts_in(pool, name) for pool in pools):
                missing = _missing(pools, name)
                yield f"pool {spec.name}: {name}: has no effect there: it needs {missing}"
