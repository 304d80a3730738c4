"""Simulated time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from heapq import heapify, heappush
from typing import Any

import simpy
from simpy.events import NORMAL

from workbench.backend import no_wait

HOPS = 512
"""Most waits that a loop may pass at a stretch before everybody else's turn comes: a run wants to show its progress. With
``skip`` a wait may stand for many steps."""


class Clock(simpy.Environment):
    """SimPy's environment, in which an event loop waits for moments.

    A loop yields a float, the moment until which it waits, or an event. Most moments come before anything else happens:
    then the clock is simply set, which gives the same times as a SimPy event at a fraction of its cost.
    """

    def __init__(self) -> None:
        super().__init__(0.0)

    def now_s(self) -> float:
        """Seconds since the simulation began."""
        return self._now

    @property
    def events(self) -> int:
        """How many events have not happened yet."""
        return len(self._queue)

    def at(self, moment_s: float) -> simpy.Event:
        """An event at an absolute time (a SimPy timeout adds a delay to now, and rounds)."""
        event = simpy.Event(self)
        event._ok, event._value = True, None
        heappush(self._queue, (moment_s, NORMAL, next(self._eid), event))
        return event

    def call_at(self, moment_s: float, act: Callable[[], None]) -> simpy.Event:
        """Have something done at an absolute time, which may be now: behind what else happens then. Returns what
        :meth:`cancel` takes."""
        event = self.at(moment_s)
        event.callbacks.append(lambda _: act())
        return event

    def after(self, delay_s: float, act: Callable[[], None]) -> simpy.Event | None:
        """Have something done after a delay: at once if there is none. Returns what :meth:`cancel` takes."""
        if delay_s <= 0:
            act()
            return None
        return self.call_at(self._now + delay_s, act)

    def cancel(self, event: simpy.Event) -> None:
        """Take back an event of :meth:`call_at` that has not happened: a run does not go on for its sake."""
        queue = self._queue
        queue[:] = [entry for entry in queue if entry[3] is not event]
        heapify(queue)

    def run_loop(self, loop: Generator[Any, None, None], skip: Callable[[Any], Any] | None = None) -> simpy.Process:
        """Start an event loop as a process of this environment. ``skip`` is given each of its waits, may take steps for it
        that are decided already, and returns what the loop waits for then (workbench/cluster/skip_ahead.py)."""
        return self.process(self._send_on(loop, skip))

    def _send_on(
        self, loop: Generator[Any, None, None], skip: Callable[[Any], Any] | None
    ) -> Generator[simpy.Event, None, None]:
        queue = self._queue
        hops = 0
        for wait in loop:
            if skip is not None:
                wait = skip(wait)
            if wait.__class__ is not float:
                if not isinstance(wait, simpy.Event):
                    loop.throw(no_wait(wait))
                yield wait
            elif hops < HOPS and (not queue or wait < queue[0][0]):
                self._now = wait
                hops += 1
            else:
                hops = 0
                yield self.at(wait)
