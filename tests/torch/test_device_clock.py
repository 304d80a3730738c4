"""The clock that turns device events into seconds of the host, with events that need no device."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402

from backends.torch.device_clock import DeviceClock  # noqa: E402


class Event:
    """Recorded at a moment of a device's clock; differences are float32 milliseconds, as CUDA's are."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def elapsed_time(self, other: Event) -> float:
        return float(np.float32((other.at_s - self.at_s) * 1e3))


@pytest.mark.parametrize("speed", [1.0, 1 + 30e-6, 1 - 30e-6])
def test_times_stay_near_the_host_for_hours(speed: float) -> None:
    draw = random.Random(0)
    clock = DeviceClock(Event(0.0), 100.0)  # type: ignore[arg-type]
    worst = worst_length = before = 0.0
    for step in range(200_000):
        start, end = 100 + step * 0.1, 100 + step * 0.1 + 0.01
        wakes = end + draw.choice((5e-6, 2e-5, 2e-3))
        events = Event((start - 100) * speed), Event((end - 100) * speed)
        start_s, end_s = clock.at(*events, wakes, True)  # type: ignore[arg-type]
        assert start_s >= before - 1e-4 and end_s <= wakes
        before = start_s
        worst = max(worst, abs(end_s - end))
        worst_length = max(worst_length, abs(end_s - start_s - 0.01))
    assert worst < 5e-4
    assert worst_length < 2e-6


def test_a_host_that_comes_late_teaches_nothing() -> None:
    clock = DeviceClock(Event(0.0), 0.0)  # type: ignore[arg-type]
    for step in range(1, 50):
        end = step * 2.0
        assert clock.at(Event(end - 1), Event(end), end + 1, False)[1] == pytest.approx(end, abs=1e-5)  # type: ignore[arg-type]
