"""Signs of life of threads and processes that compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, MutableSequence
from typing import Any

SIGN_EVERY_S = 0.2


def cpu_clock() -> Callable[[], float]:
    """The CPU seconds of the calling thread, for any thread of its process to read: they grow while it computes and stand
    while it waits for something. Where the system has no such clock (macOS), those of the process, which always grow."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


class Signs:
    """Signs of life of ranks, in memory that they share: when each was alive, and its CPU seconds."""

    def __init__(self, context: Any, ranks: int) -> None:
        self._heard_s: MutableSequence[float] = context.RawArray("d", ranks)
        self._worked_s: MutableSequence[float] = context.RawArray("d", ranks)

    def heard_s(self) -> float:
        """``time.monotonic()`` when the rank that is silent longest was alive."""
        return min(self._heard_s)

    def worked_s(self) -> float:
        """CPU seconds of all ranks together."""
        return sum(self._worked_s)

    def give(self, rank: int, on_cpu: bool) -> None:
        """Have a thread of the calling process give signs from now on, for as long as it lives.

        Only a CPU's own time tells whether something is computed: a thread that waits for a GPU may spin.
        """
        clock = cpu_clock() if on_cpu else lambda: 0.0

        def run() -> None:
            while True:
                self._worked_s[rank] = clock()
                self._heard_s[rank] = time.monotonic()
                time.sleep(SIGN_EVERY_S)

        threading.Thread(target=run, name="signs", daemon=True).start()
