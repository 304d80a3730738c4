"""Ctrl-C, noted instead of raised: a run stops between two steps and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Ctrl-C was pressed, and this is a place to stop."""


class Interrupt:
    """Watch on Ctrl-C. Itself the signal's handler: the second time, it raises at once."""

    __slots__ = ("asked",)

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Look whether Ctrl-C was pressed. Raises Interrupted if so."""
        if self.asked:
            raise Interrupted


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Note Ctrl-C from here on. Inside another such context it is the same note. Where somebody else handles or ignores
    the signal, or outside the main thread, nothing is changed and nothing noted."""
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, Interrupt):
        yield before
        return
    interrupt = Interrupt()
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """Have Ctrl-C raise, as it does where nobody notes it: for a long wait in which nothing can be lost."""
    before = signal.getsignal(signal.SIGINT)
    if not isinstance(before, Interrupt):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
