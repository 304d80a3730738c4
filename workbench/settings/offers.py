"""What an engine does not have: settings that its preset is run with, and that the engine could not be given."""

from __future__ import annotations

from collections.abc import Iterator

from workbench.settings.engines import load_engine
from workbench.settings.run_settings import RunSettings


def not_offered(settings: RunSettings, loop: str) -> Iterator[str]:
    """Say which settings of a run under ``loop``, or of a pool, the engine of its preset does not have, or not with that
    value, whether they were given or are those of a record. What is the default of all presets is none of them."""
    preset = load_engine(settings.engine)
    for name, offered in preset.offers.items():
        value = getattr(settings, name)
        if value is None or value == preset.settings.get(name, getattr(RunSettings, name)):
            continue
        if not offered:
            yield f"{name}: {preset.name} has no such setting; the run has it all the same"
        elif (value := loop if name == "loop" else value) not in offered:
            has = ", ".join(map(str, offered))
            yield f"{name}: {preset.name} has no {value}, but {has}; the run has it all the same"
