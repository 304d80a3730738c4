"""The event loops: when the CPU waits for what. Each is a generator over one backend contract (workbench/backend.py)."""

from __future__ import annotations

from workbench.loops.normal import normal_loop
from workbench.loops.overlap import overlap_loop
from workbench.loops.pipeline import pipeline_loop

LOOPS = {"normal": normal_loop, "overlap": overlap_loop, "pipeline": pipeline_loop}


def select_loop(pp: int, overlap: bool = True) -> str:
    """The loop that settings imply: more than one stage means pipeline, else overlap unless it is switched off."""
    return "pipeline" if pp > 1 else "overlap" if overlap else "normal"
