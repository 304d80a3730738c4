"""The clock of a GPU beside that of its host."""

from __future__ import annotations

import torch


class DeviceClock:
    """Events in seconds of the monotonic clock.

    The time between two events is a float32 of milliseconds, which is 60 microseconds coarse after a quarter of an hour, and
    the device's clock runs a little faster or slower than the host's. So times count from an anchor that moves along.
    """

    ANCHOR_S = 1.0
    """How old an anchor gets."""
    DRIFT = 5e-5
    """More than clocks differ by: how fast the anchor may follow the host's clock."""

    def __init__(self, anchor: torch.cuda.Event, at_s: float) -> None:
        self._anchor, self._at_s = anchor, at_s

    def at(self, start: torch.cuda.Event, end: torch.cuda.Event, now_s: float, waited: bool) -> tuple[float, float]:
        """Read when a step began and ended. Both events are over; ``waited``: the host has waited for the end, until now."""
        start_s, end_s = (self._at_s + self._anchor.elapsed_time(event) / 1e3 for event in (start, end))
        late_s = now_s - end_s
        if late_s < 0:
            # Nothing is known before it happens: the device's clock is ahead.
            start_s, end_s = start_s + late_s, now_s
            self._at_s += late_s
        if end_s - self._at_s > self.ANCHOR_S:
            # Only a host that has waited knows when it was; even then it wakes up a little later.
            follow_s = min(late_s, self.DRIFT * (end_s - self._at_s)) if waited and late_s > 0 else 0.0
            self._anchor, self._at_s = end, end_s + follow_s
        return start_s, end_s
