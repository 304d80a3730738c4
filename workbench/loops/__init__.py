"""The event loops: when the CPU waits for what. Each is a generator over one backend contract (workbench/backend.py)."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any, Protocol

from workbench.backend import Backend, Inbox, Outbox, Wait
from workbench.loops.decode_normal import decode_normal_loop
from workbench.loops.decode_overlap import decode_overlap_loop
from workbench.loops.normal import normal_loop
from workbench.loops.overlap import overlap_loop
from workbench.loops.pipeline import pipeline_loop
from workbench.loops.prefill_normal import prefill_normal_loop
from workbench.loops.prefill_overlap import prefill_overlap_loop
from workbench.loops.prefill_pipeline import prefill_pipeline_loop
from workbench.scheduler.config import Role
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
ROLE_LOOPS: dict[Role, dict[str, Any]] = {
    "both": LOOPS,
    "prefill": {"normal": prefill_normal_loop, "overlap": prefill_overlap_loop, "pipeline": prefill_pipeline_loop},
    "decode": {"normal": decode_normal_loop, "overlap": decode_overlap_loop},
}
"""Loops by the role of their instance. Those of prefill and decode have a scheduler of their role, and a wire beside the
mailboxes."""


def select_loop(pp: int, overlap: bool = True) -> str:
    """The loop that settings imply: more than one stage means pipeline, else overlap unless it is switched off."""
    return "pipeline" if pp > 1 else "overlap" if overlap else "normal"


def find_loop(name: str, role: Role = "both") -> Any:
    """A loop by name, or by ``module:function``, for instances of a role. Raises ConfigError when there is none or it is no
    loop."""
    if name in ROLE_LOOPS[role]:
        return ROLE_LOOPS[role][name]
    if role != "both" and (is_own(name) or name in LOOPS):
        raise ConfigError(f"loop: {name!r} is no loop of role {role}; there are {', '.join(ROLE_LOOPS[role])}")
    if not is_own(name):
        raise ConfigError(f"loop: {name!r} is not one of {', '.join(LOOPS)}, nor module:function")
    loop: Loop = load_own("loop", name)
    if not inspect.isgeneratorfunction(loop):
        raise ConfigError(f"loop: {name!r} is no generator function: a loop yields wherever the CPU waits")
    if not takes(loop, ("scheduler", "backend", "inbox", "outbox")):
        raise ConfigError(f"loop: {name!r} has to take (scheduler, backend, inbox, outbox)")
    return loop
