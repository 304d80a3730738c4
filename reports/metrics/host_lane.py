"""The CPU over time: the phases of every iteration laid out on one thread.

A record holds how long each CPU phase of an iteration took and when the batch was launched, not when each phase began. On
one thread the phases before the launch lie end to end up to it. `process` begins when the results are there and the thread
is free: after whatever the CPU was then busy with, and after what follows if it does not fit before that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reports.record.run_record import RunRecord

PHASES = ("receive", "schedule", "launch", "process")
RECEIVE, SCHEDULE, LAUNCH, PROCESS = range(4)
_ROUNDING_S = 1e-6


@dataclass(frozen=True)
class HostLane:
    """Disjoint bars in order of time: `kind` is a place in `PHASES`, `row` the row of iterations.csv (stage 0)."""

    kind: np.ndarray
    begin_s: np.ndarray
    end_s: np.ndarray
    row: np.ndarray


def results_s(column: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Find when the results of each iteration left the last stage; `rows` are those of stage 0 of one instance."""
    if not len(rows):
        return np.zeros(0)
    instance = column["instance"][rows[0]]
    mine = column["instance"] == instance
    last = np.flatnonzero(mine & (column["stage"] == column["stage"][mine].max()))
    order = last[np.argsort(column["iteration"][last], kind="stable")]
    place = np.searchsorted(column["iteration"][order], column["iteration"][rows])
    found = order[np.minimum(place, len(order) - 1)]
    # An interrupted run may lack the later stages of its last iterations.
    there = column["iteration"][found] == column["iteration"][rows]
    return np.where(there, column["end_s"][found], column["end_s"][rows])


def process_begins_s(column: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Find when the CPU began to process the results of each iteration.

    `rows` are those of stage 0 of one instance, in order of launch.
    """
    ends_s = column["launch_s"][rows]
    begins_s = (column["launch_s"] - column["launch_host_s"] - column["schedule_s"])[rows]
    ready_s = results_s(column, rows)
    order = np.argsort(ready_s, kind="stable")
    ready_s, process_s = ready_s[order], column["process_s"][rows][order]
    done_s = ready_s + process_s
    # Most begin when their results are there: the thread is free, and what it does next begins after them.
    following = np.searchsorted(ends_s, ready_s, side="right")
    at_once = np.concatenate(([True], ready_s[1:] >= done_s[:-1])) if len(rows) else np.zeros(0, dtype=bool)
    at_once &= done_s <= np.append(begins_s, np.inf)[following] + _ROUNDING_S
    begun_s = ready_s.copy()
    late = np.flatnonzero(~at_once).tolist()
    if late:
        _begin_late(begun_s, late, at_once.tolist(), process_s.tolist(), begins_s.tolist(), ends_s.tolist())
    found = np.zeros(len(rows))
    found[order] = begun_s
    return found


def _begin_late(
    begun_s: np.ndarray,
    late: list[int],
    at_once: list[bool],
    process_s: list[float],
    begins_s: list[float],
    ends_s: list[float],
) -> None:
    """Delay processing that would begin while the CPU is busy, in place in `begun_s`.

    `late` are the places where a delay may begin; one lasts until results arrive at an idle CPU. All lists are in order of
    time: of results (`begun_s`, `at_once`, `process_s`), and of the work before each launch (`begins_s`, `ends_s`).
    """
    ready_s = begun_s.tolist()
    reached = 0
    for first in late:
        if first < reached:
            continue
        free_s = float(begun_s[first - 1]) + process_s[first - 1] if first else 0.0
        place = first
        while place < len(ready_s) and not (at_once[place] and ready_s[place] >= free_s):
            at_s = max(ready_s[place], free_s)
            block = bisect_right(ends_s, at_s)
            while block < len(ends_s) and at_s + process_s[place] > begins_s[block] + _ROUNDING_S:
                at_s = max(at_s, ends_s[block])
                block += 1
            begun_s[place] = at_s
            free_s = at_s + process_s[place]
            place += 1
        reached = place


def host_lane(column: Mapping[str, np.ndarray], instance: int) -> HostLane:
    """Lay out the CPU of one instance over the whole run. Phases that took no time have no bar."""
    rows = first_stage_rows(column, instance)
    leading = len(rows) * PROCESS
    # Two runs that are almost in order, which is quickly sorted: what leads to each launch, and the processing. There may be
    # millions of bars, so arrays of them are few and written in place.
    begin_s, end_s = np.empty(leading + len(rows)), np.empty(leading + len(rows))
    phase_begins_s, phase_ends_s = begin_s[:leading].reshape(-1, PROCESS), end_s[:leading].reshape(-1, PROCESS)
    phase_ends_s[:, LAUNCH] = column["launch_s"][rows]
    phase_ends_s[:, SCHEDULE] = phase_begins_s[:, LAUNCH] = phase_ends_s[:, LAUNCH] - column["launch_host_s"][rows]
    phase_ends_s[:, RECEIVE] = phase_begins_s[:, SCHEDULE] = phase_ends_s[:, SCHEDULE] - column["schedule_s"][rows]
    phase_begins_s[:, RECEIVE] = phase_ends_s[:, RECEIVE] - column["receive_s"][rows]
    begin_s[leading:] = process_begins_s(column, rows)
    np.add(begin_s[leading:], column["process_s"][rows], out=end_s[leading:])
    order = np.argsort(begin_s, kind="stable")
    begin_s, end_s = begin_s[order], end_s[order]
    if ((begin_s[1:] == begin_s[:-1]) & (end_s[1:] < end_s[:-1])).any():
        # The shorter of two that begin at once comes first: rarely the case, and by far the slower way to sort.
        again = np.lexsort((end_s, begin_s))
        order, begin_s, end_s = order[again], begin_s[again], end_s[again]
    # Looks at the inbox that found nothing count into the next batch: what they took lies earlier than drawn.
    np.maximum(begin_s[1:], np.maximum.accumulate(end_s)[:-1], out=begin_s[1:])
    real = end_s > begin_s
    if not real.all():
        order, begin_s, end_s = order[real], begin_s[real], end_s[real]
    leads = order < leading
    kind = np.where(leads, order % PROCESS, PROCESS).astype(np.int8)
    return HostLane(kind, begin_s, end_s, rows[np.where(leads, order // PROCESS, order - leading)])


def host_lane_of(record: RunRecord, instance: int) -> HostLane:
    """`host_lane` of a record, worked out once."""
    key = "host_lane", instance
    if key not in record.derived:
        record.derived[key] = host_lane(record.iterations, instance)
    lane: HostLane = record.derived[key]
    return lane


def first_stage_rows(column: Mapping[str, np.ndarray], instance: int) -> np.ndarray:
    """Rows of stage 0 of `instance`, in order of launch."""
    rows = np.flatnonzero((column["stage"] == 0) & (column["instance"] == instance))
    return rows[np.argsort(column["launch_s"][rows], kind="stable")]
