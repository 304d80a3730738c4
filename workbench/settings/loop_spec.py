"""Specifications of a run's loops from its settings."""

from __future__ import annotations

from workbench.instance import LoopSpec
from workbench.loops import find_loop
from workbench.settings.run_settings import RunSettings


def loop_spec(settings: RunSettings, loop: str) -> LoopSpec:
    """A loop of the run, with what the settings ask of it. Raises ConfigError for one of the user's own that is no loop."""
    find_loop(loop, settings.role)
    return LoopSpec(loop, settings.overlap_prefills)
