"""Time as the clients of a run in real time see it."""

from __future__ import annotations

import simpy


class LiveClock(simpy.Environment):
    """SimPy's environment, in which clients wait, moved on by whoever follows a real clock."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def advance_to(self, moment_s: float) -> None:
        """Let everything happen that is due by then, and be there."""
        while self.peek() <= moment_s:
            self.step()
        self._now = max(self._now, moment_s)
