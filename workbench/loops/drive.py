"""Running a loop in real time."""

from __future__ import annotations

from collections.abc import Callable, Generator

from workbench.backend import Wait, no_wait


def drive(loop: Generator[Wait, None, None], waited: Callable[[], None] | None = None) -> None:
    """Send a loop on for ever. Live, a wait is a function that blocks until it is over, or None when there is nothing to
    wait for; what it raises ends the loop and reaches the caller. ``waited`` is called after every wait."""
    for wait in loop:
        if wait is not None:
            if not callable(wait):
                loop.throw(no_wait(wait))
            wait()
            if waited is not None:
                waited()
