"""Runs in real time say how long they wait for the next request."""

from __future__ import annotations

from itertools import count

import pytest

from workbench.cli.waits import SaidWaits, spoken
from workbench.clients.live_clock import LiveClock
from workbench.cluster.interrupts import Interrupt


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (12, "12 s"),
        (80, "1 min 20 s"),
        (120, "2 min"),
        (140738, "1 d 15 h"),
        (3600 * 39 + 330, "1 d 15 h"),
        (7230, "2 h"),
        (7290, "2 h 1 min"),
        (86400 * 40, "40 d"),
    ],
)
def test_a_duration_is_spoken_in_its_two_largest_units(seconds, words):
    assert spoken(seconds) == words


def test_a_long_wait_is_said_once(capsys):
    said = SaidWaits()
    for now_s in (0.0, 1.0, 2.0):
        said(3600.0, now_s)
    said(5.0, 0.0)  # not long
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["waiting: the next request comes in 1 h; Ctrl-C keeps what there is"]


def test_a_replay_that_waits_tells_for_what(monkeypatch):
    replay = pytest.importorskip("workbench.cluster.replay")
    monkeypatch.setattr(replay.time, "sleep", lambda seconds: None)
    clock, ticks, told = LiveClock(), count(0, 1000), []
    inbox = replay.ReplayInbox(
        clock, lambda: float(next(ticks)), lambda messages: None, Interrupt(), lambda *at: told.append(at)
    )
    clock.timeout(5000.0).callbacks.append(lambda event: inbox.put("a request"))  # type: ignore[union-attr]
    inbox.arrival()()
    assert told[0] == (5000.0, 0.0) and len(told) > 1
    assert inbox.drain() == ["a request"]
