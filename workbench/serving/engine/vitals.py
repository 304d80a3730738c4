"""Vital signs of the scheduler process: counts kept by its loop, sent to the HTTP process by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import zmq

from workbench.phase_log import IterationRow
from workbench.scheduler.scheduler import Scheduler
from workbench.serving.engine.grammar_costs import Spent
from workbench.serving.wire import Addresses, Beat, Broken, EndAsked, Pulse, encode, push_socket

BEAT_EVERY_S = 0.1
BEATS_WAITING = 100
"""Beats that wait at most for a process that does not read."""


class Vitals:
    """Counters of one scheduler. The loop writes; the heartbeat reads, and sends even while the loop is stuck.

    ``worked_s`` and ``heard_s`` are those of :class:`~workbench.serving.backends.live_backend.LiveBackend`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worked_s: Callable[[], float] = lambda: 0.0,
        heard_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._worked_s, self._heard_s = worked_s, heard_s
        self._worked_before_s = 0.0
        self.progress_s = time.monotonic()
        self.pending = False
        self.iterations = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generated_tokens = 0
        self.retractions = 0
        self._phase_s = [0.0, 0.0, 0.0, 0.0]
        self.grammars = Spent()

    def moved(self) -> None:
        """Note that the loop has come to a new iteration."""
        self.progress_s = time.monotonic()
        self.pending = True

    def resting(self) -> None:
        """Note that the loop has nothing to do before a message comes."""
        self.progress_s = time.monotonic()
        self.pending = False

    def note_iteration(self, row: IterationRow) -> None:
        """Note a row of iterations.csv. Stages after the first are the same iteration."""
        if row.stage == 0:
            self.iterations += 1
        for i, spent in enumerate((row.receive_s, row.schedule_s, row.launch_host_s, row.process_s)):
            self._phase_s[i] += spent

    def beat(self) -> Beat:
        scheduler = self._scheduler
        receive, schedule, launch, process = self._phase_s
        now_s, worked_s = time.monotonic(), self._worked_s()
        if worked_s != self._worked_before_s:
            # A batch may take minutes: as long as something computes, the loop that waits for it is not stuck.
            self._worked_before_s = worked_s
            self.progress_s = now_s
        return Beat(
            now_s,
            self._heard_s(),
            self.progress_s,
            self.pending,
            scheduler.paused,
            len(scheduler.queue) + scheduler.queue.elsewhere,
            scheduler.slots.running_count + len(scheduler.slots.partial),
            scheduler.kv.used_tokens,
            scheduler.kv.cached_tokens,
            all(slot.full for slot in scheduler.slots),
            self.iterations,
            self.prompt_tokens,
            self.cached_prompt_tokens,
            self.generated_tokens,
            self.retractions,
            (receive, schedule, launch, process),
            self.grammars.tokens,
            self.grammars.mask_s,
            self.grammars.compiled,
            self.grammars.compile_s,
        )


@contextmanager
def heartbeat(
    vitals: Vitals,
    context: zmq.Context[Any],
    addresses: Addresses,
    failure: Callable[[], str | None] = lambda: None,
    end_asked: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Send a :class:`Beat` to the HTTP process and a :class:`Pulse` on the way of answers, every tenth of a second while the
    body runs; and once each, when there is something to tell, ``failure`` to the loop, which may be waiting for a message,
    and ``end_asked`` to the HTTP process. Both are those of ``LiveBackend``."""
    over = threading.Event()

    def run() -> None:
        scheduler = push_socket(context, addresses.scheduler, BEATS_WAITING)
        broken = asked = False
        # A frozen process reads nothing: what it has not heard by then it need not hear.
        http = push_socket(context, addresses.http, BEATS_WAITING)
        detokenizer = push_socket(context, addresses.detokenizer, BEATS_WAITING)
        while not over.wait(BEAT_EVERY_S):
            beat = vitals.beat()
            for socket, message in ((http, beat), (detokenizer, Pulse(beat.sent_s, time.process_time()))):
                with suppress(zmq.Again):
                    socket.send(encode(message), zmq.NOBLOCK)
            if not broken and (line := failure()) is not None:
                broken = True
                scheduler.send(encode(Broken(line)))
            if not asked and (who := end_asked()) is not None:
                asked = True
                http.send(encode(EndAsked(who)))
        scheduler.close(0)
        http.close(0)
        detokenizer.close(0)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
