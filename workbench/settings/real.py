"""Settings where a run is real, or in real time: defaults of its device, and what such a run does not heed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.scheduler.config import ConfigError
from workbench.scheduler.settings import Place
from workbench.settings.engines import load_engine
from workbench.settings.loading import SETTINGS, read_settings_file
from workbench.settings.offers import not_offered
from workbench.settings.pool_spec import parse_pools
from workbench.settings.run_settings import RunSettings

TORCH_DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": None}
"""What weights can be in on a real runner, as torch calls it. ``auto``: as the model was saved. ``fp8``: the projections;
everything else as saved."""
CPU_STEP_TOKENS = 512
"""Prompt tokens of a step on a CPU unless told otherwise: it then takes seconds, not minutes, so that decodes, timeouts and
clients that leave do not wait for the whole of a long prompt."""


def device_defaults(device: str) -> dict[str, Any]:
    """Settings of a run on ``device`` that are neither given nor those of a simulation."""
    return {"chunk": CPU_STEP_TOKENS, "max_batch_tokens": CPU_STEP_TOKENS} if device == "cpu" else {}


def check_device_effects(flags: Mapping[str, Any], config: Path | None, device: str) -> list[str]:
    """Notes on settings of the file ``config`` that do nothing on a real ``device``.

    Raises ConfigError for such a flag that was given (not None).
    """
    idle = idle_in_places("real")
    if device == "cpu":
        idle["mem_fraction"] = "the memory of a CPU is not shared out; kv_tokens says how much KV there is"
        idle["cuda_graphs"] = "there are none on a CPU"
    said = {name: f"{name}: has no effect on a real {device} runner: {why}" for name, why in idle.items()}
    for name in said:
        if flags.get(name):
            raise ConfigError(said[name])
    for spec in parse_pools(flags.get("pool") or ()):
        for name, _ in spec.given:
            if name in said:
                raise ConfigError(f"pool {spec.name}: {said[name]}")
    return _noted(said, flags, config)


def live_notes(config: Path | None, *places: Place) -> list[str]:
    """Notes on settings of the file ``config`` that do nothing in ``places``, where there are no flags for them."""
    said = {name: f"{name}: has no effect here: {why}" for name, why in idle_in_places(*places).items()}
    return _noted(said, {}, config)


def preset_notes(settings: RunSettings, loop: str, simulated: bool = False) -> list[str]:
    """Say what of an engine's preset acts in real time, over a real or a ``simulated`` GPU, and what the run has that
    the engine has not."""
    engine = load_engine(settings.engine)
    if not engine.settings:
        return []
    alone = "CPU phases and front end are" if simulated else "CPU phases, graphs, exchange of experts and front end are"
    acts = f"engine: rules, loop and limits are those of {engine.name}; its {alone} for simulation alone"
    return [acts, *not_offered(settings, loop)]


def without_idle(settings: RunSettings, *places: Place) -> RunSettings:
    """Settings as they are used in ``places``: those that do nothing there are as if nobody had said them."""
    return replace(settings, **{name: SETTINGS[name].default for name in idle_in_places(*places)})


def idle_in_places(*places: Place) -> dict[str, str]:
    """Why settings have no effect in ``places``, of those that have none."""
    return {name: why for name, each in SETTINGS.items() for place, why in each.idle.items() if place in places}


def _noted(said: Mapping[str, str], flags: Mapping[str, Any], config: Path | None) -> list[str]:
    written = read_settings_file(config) if config is not None else {}
    pools = [] if flags.get("pool") or flags.get("dp") else parse_pools(written.get("pool") or ())
    return [
        *(
            f"{config}: {said[name]}"
            for name, value in written.items()
            if name in said and value and not flags.get(name)
        ),
        *(f"{config}: pool {pool.name}: {said[name]}" for pool in pools for name, _ in pool.given if name in said),
    ]
