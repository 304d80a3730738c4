"""What an engine does not have: settings that its preset is run with, and that the engine could not be given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.scheduler.settings import RULES
from workbench.settings.engines import Engine, load_engine
from workbench.settings.idle import acts
from workbench.settings.loading import SETTINGS
from workbench.settings.run_settings import RunSettings


def not_offered(settings: RunSettings, loop: str) -> Iterator[str]:
    """Say which settings of a run under ``loop``, or of a pool, the engine of its preset does not have, or not with that
    value, whether they were given or are those of a record. What is the default of all presets is none of them."""
    preset = load_engine(settings.engine)
    for name, offered in preset.offers.items():
        value = getattr(settings, name)
        if value is None or value == _usual(preset, name) or not acts(settings, loop, name):
            continue
        if not offered:
            yield f"{name}: {preset.name} has no such setting; the run has it all the same"
        elif (value := loop if name == "loop" else value) not in (values := _values(name, offered, settings)):
            has = ", ".join(map(str, values))
            yield f"{name}: {preset.name} has no {value}, but {has}; the run has it all the same"
    if preset.settings:
        yield from _other_rules(preset, settings, loop)


def _values(name: str, offered: list[Any], settings: RunSettings) -> list[Any]:
    """What is offered of a setting where it goes by others."""
    if name != "ep":
        return offered
    return [{"all": settings.tp * settings.dp, "tp": settings.tp}[each] for each in offered]


def _other_rules(preset: Engine, settings: RunSettings, loop: str) -> Iterator[str]:
    """Say which rules of engines are another one's, in one line: most come together, with a record."""
    others = [
        f"{name} is {_said(usual)} there, not {_said(value)}"
        for name, declared in SETTINGS.items()
        if declared.group == RULES
        and name not in (*preset.offers, *preset.tunable)
        and (value := getattr(settings, name)) != (usual := _usual(preset, name))
        and acts(settings, loop, name)
    ]
    if others:
        yield f"rules: not those of {preset.name}: {'; '.join(others)}; the run has them all the same"


def _usual(preset: Engine, name: str) -> Any:
    """What the preset of an engine has of a setting, where the GPU does not decide."""
    return SETTINGS[name].meant(preset.settings.get(name, SETTINGS[name].default))


def _said(value: Any) -> str:
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)
