"""How the scheduler process stands: counts kept by its loop, sent to the HTTP process by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from workbench.scheduler.scheduler import Scheduler
from workbench.serving.messages import Beat, encode, push_socket

BEAT_EVERY_S = 0.1


class Vitals:
    """Counters of one scheduler. The loop writes; the heartbeat reads, and sends even while the loop is stuck."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.progress_s = time.monotonic()
        self.pending = False
        self.iterations = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generated_tokens = 0
        self.retractions = 0
        self._phase_s = [0.0, 0.0, 0.0, 0.0]

    def moved(self) -> None:
        """The loop has come to a new iteration."""
        self.progress_s = time.monotonic()
        self.pending = True

    def resting(self) -> None:
        """The loop has nothing to do before a message comes."""
        self.progress_s = time.monotonic()
        self.pending = False

    def note_iteration(self, row: tuple[Any, ...]) -> None:
        """A row of iterations.csv has been logged. Stages after the first are the same iteration."""
        if row[2] == 0:
            self.iterations += 1
        for i, spent in enumerate(row[-4:]):
            self._phase_s[i] += spent

    def beat(self) -> Beat:
        state = self._scheduler.state
        cache = state.cache
        receive, schedule, launch, process = self._phase_s
        return Beat(
            time.monotonic(), self.progress_s, self.pending, self._scheduler.paused, len(state.waiting),
            state.running_count + (state.chunked is not None), cache.used_tokens,
            cache.tree.evictable_pages * cache.page_size, all(slot.full for slot in state.slots), self.iterations,
            self.prompt_tokens, self.cached_prompt_tokens, self.generated_tokens, self.retractions,
            (receive, schedule, launch, process),
        )  # fmt: skip


@contextmanager
def heartbeat(vitals: Vitals, context: zmq.Context[Any], address: str) -> Iterator[None]:
    """Send a :class:`Beat` every tenth of a second while the body runs."""
    over = threading.Event()

    def run() -> None:
        socket = push_socket(context, address)
        while not over.wait(BEAT_EVERY_S):
            socket.send(encode(vitals.beat()))
        socket.close(0)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
