"""What an engine does not have: settings that a preset is asked for with, and that its engine could not be given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from workbench.settings.engines import load_engine
from workbench.settings.run_settings import RunSettings


def not_offered(settings: RunSettings, given: Iterable[str]) -> list[str]:
    """Say which of the settings that somebody gave, for the run or for a pool, an engine does not have, or not with that
    value. The run has them all the same."""
    names = set(given)
    if not settings.pool:
        return list(_missing(settings.engine, settings, names))
    found: list[str] = []
    for pool in settings.pools(settings.loops[0]):
        own = {name for name in pool.given if name != "engine"}
        found += [f"pool {pool.name}: {said}" for said in _missing(pool.settings.engine, pool.settings, names | own)]
    return found


def _missing(engine: str, settings: RunSettings, names: set[str]) -> Iterator[str]:
    preset = load_engine(engine)
    for name, offered in preset.offers.items():
        value = getattr(settings, name)
        if name not in names or value is None or value == preset.settings.get(name):
            continue
        if not offered:
            yield f"{name}: {engine} has no such setting; the run has it all the same"
            continue
        asked = settings.loops if name == "loop" else [value]
        if other := [str(value) for value in asked if value not in offered]:
            has = ", ".join(map(str, offered))
            yield f"{name}: {engine} has no {', '.join(other)}, but {has}; the run has it all the same"
