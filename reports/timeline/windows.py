"""The moment with most to do, as bars on CPU and GPU lanes: what each was doing, to scale.

The GPU bars are measured, the CPU's are laid out by host_lane.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reports.metrics.host_lane import PHASES, HostLane, host_lane_of
from reports.record.run_record import RunRecord
from reports.record.schema import MODES

ITERATIONS_SHOWN = 16
_LONGEST = 4
"""No window is longer than so many times the shortest: a fast run would show too many bars to tell apart."""
_BUSY_ENOUGH = 0.8
"""Share of the fullest window's load that the shown one has at least: the shortest such shows CPU phases best."""


@dataclass(frozen=True)
class Bar:
    """Something that a lane did, from `begin_s` to `end_s`; `kind` is a mode or a CPU phase."""

    kind: str
    begin_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Window:
    """A stretch of one instance of a run: bars by lane (`CPU`, `GPU` or `GPU 0`, `GPU 1`, ...)."""

    begin_s: float
    end_s: float
    instance: int
    lanes: dict[str, list[Bar]]


def busiest_windows(records: Mapping[str, RunRecord]) -> dict[str, Window]:
    """A window of every run that has iterations, all of one length: about 16 iterations of the slowest run."""
    places = {name: place for name, record in records.items() if (place := _busiest(record)) is not None}
    if not places:
        return {}
    spans_s = [span_s for _, _, span_s in places.values()]
    length_s = min(max(spans_s), _LONGEST * min(spans_s))
    return {
        name: _window(records[name], instance, begin_s, begin_s + length_s)
        for name, (instance, begin_s, _) in places.items()
    }


def _busiest(record: RunRecord) -> tuple[int, float, float] | None:
    """Instance, begin and length of the chosen iterations; None if there is nothing to draw."""
    column = record.iterations
    if not len(column["iteration"]):
        return None
    first = column["stage"] == 0
    fullest = np.argmax(np.where(first, column["running"], -1))
    instance = int(column["instance"][fullest])
    rows = np.flatnonzero(first & (column["instance"] == instance))
    rows = rows[np.argsort(column["start_s"][rows], kind="stable")]
    shown = min(ITERATIONS_SHOWN, len(rows))
    load = np.convolve(column["running"][rows], np.ones(shown), mode="valid")
    spans_s = column["end_s"][rows][shown - 1 :] - column["start_s"][rows][: len(load)]
    place = int(np.argmin(np.where(load >= _BUSY_ENOUGH * load.max(), spans_s, np.inf)))
    before_s = sum(float(column[phase][rows[place]]) for phase in ("receive_s", "schedule_s", "launch_host_s"))
    begin_s = min(float(column["launch_s"][rows[place]]) - before_s, float(column["start_s"][rows[place]]))
    span_s = float(column["end_s"][rows[place + shown - 1]]) - begin_s
    return (instance, begin_s, span_s) if span_s > 0 else None


def _window(record: RunRecord, instance: int, begin_s: float, end_s: float) -> Window:
    column = record.iterations
    near = (column["end_s"] >= begin_s - (end_s - begin_s)) & (column["launch_s"] <= end_s + (end_s - begin_s))
    rows = np.flatnonzero(near & (column["instance"] == instance))
    stages = int(column["stage"][column["instance"] == instance].max()) + 1
    lanes: dict[str, list[Bar]] = {"CPU": _cpu_bars(host_lane_of(record, instance), column, begin_s, end_s)}
    for stage in range(stages):
        lane = "GPU" if stages == 1 else f"GPU {stage}"
        lanes[lane] = [_gpu_bar(column, int(row)) for row in rows if column["stage"][row] == stage]
    inside = {
        lane: [bar for bar in bars if bar.end_s > begin_s and bar.begin_s < end_s] for lane, bars in lanes.items()
    }
    return Window(begin_s, end_s, instance, inside)


def _gpu_bar(column: Mapping[str, np.ndarray], row: int) -> Bar:
    mode = MODES[column["mode"][row]]
    tokens = int(column["prefill_tokens"][row] + column["decode_tokens"][row])
    text = f"#{column['iteration'][row]} {mode}: {column['requests'][row]} requests, {tokens} tokens"
    return Bar(mode, float(column["start_s"][row]), float(column["end_s"][row]), text)


def _cpu_bars(lane: HostLane, column: Mapping[str, np.ndarray], begin_s: float, end_s: float) -> list[Bar]:
    inside = np.flatnonzero((lane.end_s > begin_s) & (lane.begin_s < end_s))
    return [
        Bar(
            PHASES[lane.kind[at]],
            float(lane.begin_s[at]),
            float(lane.end_s[at]),
            f"#{column['iteration'][lane.row[at]]} {PHASES[lane.kind[at]]}",
        )
        for at in inside
    ]
