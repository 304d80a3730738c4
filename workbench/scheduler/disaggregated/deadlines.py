"""Deadlines of handovers, all with the same limit."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterator

from workbench.scheduler.disaggregated.letters import Room


class Deadlines:
    """Moments at which handovers run out of time, in the order in which they began."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._due: deque[tuple[float, Room]] = deque()

    def begin(self, room: Room, now_s: float) -> None:
        """The time of a handover begins."""
        self._due.append((now_s + self._limit_s, room))

    def next_s(self, open_rooms: Container[Room]) -> float:
        """Return the deadline of the oldest of these handovers; infinite where there is none."""
        while self._due and self._due[0][1] not in open_rooms:
            self._due.popleft()
        return self._due[0][0] if self._due else math.inf

    def over(self, open_rooms: Container[Room], now_s: float) -> Iterator[Room]:
        """Take out each of these handovers whose time is over."""
        while self.next_s(open_rooms) <= now_s:
            yield self._due.popleft()[1]
