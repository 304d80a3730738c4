"""The event loops: when the CPU waits for what. Each is a generator over one backend contract (workbench/backend.py)."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Protocol

from workbench.backend import Backend, Inbox, Outbox, Wait
from workbench.loops.normal import normal_loop
from workbench.loops.overlap import overlap_loop
from workbench.loops.pipeline import pipeline_loop
from workbench.scheduler.own_code import load_own, takes
from workbench.scheduler.scheduler import Scheduler
from workbench.scheduler.settings import ConfigError, is_own


class Loop(Protocol):
    """An event loop: a generator function that goes on for ever, and ends with whoever drives it.

    It drains ``inbox`` into ``scheduler``, launches the batches that the scheduler chooses on ``backend``, hands their
    output back to it and reports results to ``outbox``; where the CPU has to wait, it yields what ``backend`` or ``inbox``
    say to wait for. It notes every CPU phase with ``backend.host``: what is not noted takes no simulated time.
    """

    def __call__(
        self, scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox, /
    ) -> Generator[Wait, None, None]: ...


LOOPS: dict[str, Loop] = {"normal": normal_loop, "overlap": overlap_loop, "pipeline": pipeline_loop}


def select_loop(pp: int, overlap: bool = True) -> str:
    """The loop that settings imply: more than one stage means pipeline, else overlap unless it is switched off."""
    return "pipeline" if pp > 1 else "overlap" if overlap else "normal"


def find_loop(name: str) -> Loop:
    """A loop by name, or by ``module:function``. Raises ConfigError when there is none or it is no loop."""
    if name in LOOPS:
        return LOOPS[name]
    if not is_own(name):
        raise ConfigError(f"loop: {name!r} is not one of {', '.join(LOOPS)}, nor module:function")
    loop: Loop = load_own("loop", name)
    if not inspect.isgeneratorfunction(loop):
        raise ConfigError(f"loop: {name!r} is no generator function: a loop yields wherever the CPU waits")
    if not takes(loop, ("scheduler", "backend", "inbox", "outbox")):
        raise ConfigError(f"loop: {name!r} has to take (scheduler, backend, inbox, outbox)")
    return loop
