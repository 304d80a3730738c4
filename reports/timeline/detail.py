"""The timeline of a run as the page holds it: every iteration where they fit, else stretches of them and bins of the whole.

Times are whole ticks: a nanosecond, or a tenth of a microsecond where that is needed to make it fit, or what a very long run
leaves. Columns are stored
as what is left when the obvious is taken away: the CPU begins where it stopped, a batch starts where the one before ended,
a decode step is as long as the last. timeline.js adds it up again; `tests/reports/test_detail.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.metrics.host_lane import PHASES, first_stage_rows, host_lane_of, process_begins_s
from reports.metrics.instances import instance_names, pools_of
from reports.metrics.intervals import covered, union
from reports.metrics.summary import run_window
from reports.metrics.time_use import CAUSES, NONE, idle_pieces
from reports.record.run_record import RunRecord
from reports.record.schema import MODES, RETRACTED
from reports.timeline.packed import differences, packed, packed_text, text_of, tick_s_of

TICKS_S = (1e-9, 1e-7)
BINS = 2048
STRETCHES = 24
LEFT_OUT = 7
"""Cause of a gap that is none: iterations are left out there."""
MOST_LAG = 9
MOST_TRANSFERS = 10_000
TRANSFER_ROWS = 6


@dataclass(frozen=True)
class _Instance:
    """Iterations of one instance in order of launch; `rows[stage]` are rows of iterations.csv."""

    number: int
    rows: list[np.ndarray]
    process_s: np.ndarray
    causes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Per stage and iteration, of the gap before it: first cause, how long that lasts (s), second cause."""


def timeline_detail(record: RunRecord, budget_bytes: int) -> dict[str, Any] | None:
    """Pack what timeline.js draws the timeline of a run from, in about `budget_bytes`; None without iterations."""
    window = run_window(record)
    if window is None or not len(record.iterations["iteration"]):
        return None
    numbers = sorted(set(record.iterations["instance"].tolist()))
    transfers = _transfers(record, window)
    share = (budget_bytes - (len(transfers["data"]) + len(transfers["ids"]["data"]) if transfers else 0)) // len(
        numbers
    )
    names = instance_names(record)
    pools = {number: pool for pool in pools_of(record) for number in pool.numbers}
    return {
        "begin_s": window.begin_s,
        "end_s": window.end_s,
        **({"transfers": transfers} if transfers else {}),
        "instances": [
            {
                "name": names.get(number, f"instance {number}"),
                **({"pool": pools[number].name, "role": pools[number].role} if number in pools else {}),
                "stages": window.stages_each[number],
                **_instance_detail(record, number, window, share),
            }
            for number in numbers
        ],
    }


def _transfers(record: RunRecord, window: Any) -> dict[str, Any] | None:
    """KV on its way between instances, packed: `begin`, `lasts`, `row` (those at the same time lie in different ones),
    `source`, `target`, `tokens`, and `ids` of the requests; None where there was none. Of very many every so many are
    kept."""
    column = record.requests
    known = ~np.isnan(column["transfer_start_s"]) & ~np.isnan(column["transfer_end_s"])
    rows = np.flatnonzero(known)
    if not len(rows):
        return None
    rows = rows[np.argsort(column["transfer_start_s"][rows], kind="stable")]
    kept = rows[:: -(-len(rows) // MOST_TRANSFERS)]
    tick_s = tick_s_of(max(abs(window.begin_s), abs(window.end_s)), TICKS_S[1])
    begins, ends = (
        np.rint(column[name][kept] / tick_s).astype(np.int64) for name in ("transfer_start_s", "transfer_end_s")
    )
    table = {
        "begin": differences(begins),
        "lasts": ends - begins,
        "row": _side_by_side(begins.tolist(), ends.tolist()),
        "source": column["prefill_instance"][kept].astype(np.int64),
        "target": column["decode_instance"][kept].astype(np.int64),
        "tokens": column["input_tokens"][kept],
    }
    return {
        "tick_s": tick_s,
        "of": len(rows),
        "ids": packed_text([column["request_id"][row] for row in kept.tolist()]),
    } | packed(table)


def _side_by_side(begins: list[int], ends: list[int]) -> np.ndarray:
    """The first row for each of these stretches, in order of their beginning, that is free by then; at most `TRANSFER_ROWS`,
    beyond which they lie upon each other."""
    free: list[int] = []
    found = []
    for begin, end in zip(begins, ends, strict=True):
        place = next((place for place, at in enumerate(free) if at <= begin), len(free))
        if place == len(free):
            if len(free) < TRANSFER_ROWS:
                free.append(end)
            else:
                place = min(range(TRANSFER_ROWS), key=free.__getitem__)
        free[place] = max(free[place], end)
        found.append(place)
    return np.array(found, dtype=np.int64)


def _instance_detail(record: RunRecord, number: int, window: Any, budget_bytes: int) -> dict[str, Any]:
    instance = _aligned(record, number, window)
    everything = np.arange(len(instance.process_s))
    bytes_a_row = 1.0
    ticks_s = [tick_s_of(max(abs(window.begin_s), abs(window.end_s)), tick_s) for tick_s in TICKS_S]
    for tick_s in ticks_s:
        # Packing all of a long run takes a second: a part of it tells whether it is worth it.
        part = everything[: max(len(everything) // 50, 2000)]
        bytes_a_row = len(_encoded(record, instance, part, tick_s)["data"]) / max(len(part), 1)
        if bytes_a_row * len(everything) > budget_bytes * 1.1:
            continue
        found = _encoded(record, instance, everything, tick_s)
        if len(found["data"]) <= budget_bytes:
            return {"instance": number, "whole": True, **found}
        bytes_a_row = len(found["data"]) / len(everything)
    bins = _bins(record, number, window)
    room = max(budget_bytes - len(bins), budget_bytes // 4)
    chosen = _stretches(record, instance, int(room / bytes_a_row * 0.9))
    return {
        "instance": number,
        "whole": False,
        **_encoded(record, instance, chosen, ticks_s[-1]),
        "bins": BINS,
        "shares": bins,
        "of": len(everything),
    }


def _aligned(record: RunRecord, number: int, window: Any) -> _Instance:
    column = record.iterations
    rows = first_stage_rows(column, number)
    process_s = process_begins_s(column, rows)
    stages = [rows]
    there = np.ones(len(rows), dtype=bool)
    for stage in range(1, window.stages_each[number]):
        mine = np.flatnonzero((column["instance"] == number) & (column["stage"] == stage))
        mine = mine[np.argsort(column["iteration"][mine], kind="stable")]
        place = np.searchsorted(column["iteration"][mine], column["iteration"][rows])
        inside = place < len(mine)
        place = np.minimum(place, max(len(mine) - 1, 0))
        there &= inside & (column["iteration"][mine][place] == column["iteration"][rows] if len(mine) else False)
        stages.append(mine[place] if len(mine) else rows)
    stages = [each[there] for each in stages]  # an interrupted run may lack the end of its last iterations
    pieces = idle_pieces(record, number, window.stages_each[number], window.begin_s, window.end_s)
    causes = [
        _gap_causes(column, each, pieces.edges_s, pieces.cause[stage], window.begin_s)
        for stage, each in enumerate(stages)
    ]
    return _Instance(number, stages, process_s[there], causes)


def _gap_causes(
    column: Mapping[str, np.ndarray], rows: np.ndarray, edges_s: np.ndarray, cause: np.ndarray, begin_s: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gap before each batch: without work first, then what else it mostly was."""
    seconds = np.diff(edges_s)
    from_s = np.concatenate(([begin_s], column["end_s"][rows][:-1]))
    to_s = np.maximum(column["start_s"][rows], from_s)
    parts = []
    for place in range(len(CAUSES)):
        upto = np.concatenate(([0.0], np.cumsum(np.where(cause == place, seconds, 0.0))))
        parts.append(np.interp(to_s, edges_s, upto) - np.interp(from_s, edges_s, upto))
    by_cause = np.array(parts)
    none_s = by_cause[NONE].copy()
    by_cause[NONE] = 0
    second = by_cause.argmax(axis=0)
    only_none = by_cause.sum(axis=0) < 1e-9
    first = np.where(none_s > 1e-9, NONE, second)
    return first, np.where(none_s > 1e-9, none_s, 0.0), np.where(only_none & (none_s > 1e-9), NONE, second)


def _encoded(record: RunRecord, instance: _Instance, chosen: np.ndarray, tick_s: float) -> dict[str, Any]:
    column = record.iterations
    rows = [each[chosen] for each in instance.rows]
    first = rows[0]

    def ticks(seconds: np.ndarray) -> np.ndarray:
        return np.rint(seconds / tick_s).astype(np.int64)

    starts = [ticks(column["start_s"][each]) for each in rows]
    ends = [ticks(column["end_s"][each]) for each in rows]
    receive, schedule, launch = (ticks(column[name][first]) for name in ("receive_s", "schedule_s", "launch_host_s"))
    process = ticks(column["process_s"][first])
    host = ticks(column["launch_s"][first]) - receive - schedule - launch
    ready = np.maximum.reduce(ends)
    processed = ticks(instance.process_s[chosen])
    lag, resumed = _resumed(host, processed + process)
    columns: dict[str, np.ndarray] = {"iteration": differences(column["iteration"][first])}
    lasted = np.zeros(len(first), dtype=np.int64)
    for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
        free = np.concatenate(([0], end[:-1])) if len(end) else end
        expected = free if stage == 0 else np.maximum(free, ends[stage - 1])
        columns[f"start{stage}"] = start - expected
        columns[f"lasts{stage}"] = differences(end - start - lasted)
        lasted = end - start
        causes, split_s, then = (values[chosen] for values in instance.causes[stage])
        borders = np.concatenate(([False], np.diff(chosen) > 1)) if len(chosen) else np.zeros(0, dtype=bool)
        columns[f"cause{stage}"] = np.where(borders, LEFT_OUT * 9, causes + 8 * then)
        columns[f"split{stage}"] = np.where(borders, 0, ticks(split_s))
    columns["host"] = resumed
    columns["processed"] = processed - ready
    for name, values in (("receive", receive), ("schedule", schedule), ("launch", launch), ("process", process)):
        columns[name] = differences(values)
    decode = column["decode_tokens"][first]
    columns["mode"] = column["mode"][first]
    columns["requests"] = differences(column["requests"][first])
    columns["prefill_tokens"] = column["prefill_tokens"][first]
    columns["decode_tokens"] = column["requests"][first] - decode
    columns["context_tokens"] = differences(column["context_tokens"][first]) - decode
    columns["kv_used_tokens"] = differences(column["kv_used_tokens"][first]) - decode
    columns["waiting"] = differences(column["waiting"][first])
    columns["running"] = differences(column["running"][first])
    return {"tick_s": tick_s, "lag": lag, **packed(columns)}


def _resumed(host: np.ndarray, processed_end: np.ndarray) -> tuple[int, np.ndarray]:
    """Find how many batches the CPU is ahead: (that lag, ticks from processing batch i - lag to its work on batch i).

    Mostly the CPU goes straight from one to the other, so the right lag is the one that leaves the most zeros.
    """
    best: tuple[int, np.ndarray] | None = None
    for lag in range(1, MOST_LAG + 1):
        left = host.copy()
        left[lag:] -= processed_end[:-lag]
        if best is None or np.count_nonzero(left) < np.count_nonzero(best[1]):
            best = (lag, left)
    assert best is not None
    return best


def _stretches(record: RunRecord, instance: _Instance, keep: int) -> np.ndarray:
    """About `keep` iterations: half of them around the busiest moment, the others in stretches over the whole run and
    where memory ran out."""
    total = len(instance.process_s)
    column = record.iterations
    running = column["running"][instance.rows[0]]
    length = min(max(keep // 2, 1), total)
    upto = np.concatenate(([0], np.cumsum(running)))
    first = int(np.argmax(upto[length:] - upto[:-length]))
    taken = np.zeros(total, dtype=bool)
    taken[first : first + length] = True
    events = record.events
    lost = [
        int(iteration)
        for iteration, number, event in zip(events["iteration"], events["instance"], events["event"], strict=True)
        if event == RETRACTED and number == instance.number
    ]
    centres = list(np.linspace(0, total, STRETCHES).astype(int))
    if lost:
        iterations = column["iteration"][instance.rows[0]]
        centres += [int(np.searchsorted(iterations, lost[place])) for place in (0, len(lost) // 2, len(lost) - 1)]
    each = max((keep - length) // len(centres), 1)
    for centre in centres:
        taken[max(centre - each // 2, 0) : centre + (each + 1) // 2] = True
    return np.flatnonzero(taken)


def _bins(record: RunRecord, number: int, window: Any) -> str:
    """Shares of each of `BINS` equal bins, in 255ths: the CPU's phases, then for every stage its modes and idle causes."""
    edges_s = np.linspace(window.begin_s, window.end_s, BINS + 1)
    width_s = (window.end_s - window.begin_s) / BINS
    lane = host_lane_of(record, number)
    column = record.iterations
    shares = [
        np.diff(covered(union(lane.begin_s[lane.kind == kind], lane.end_s[lane.kind == kind]), edges_s))
        for kind in range(len(PHASES))
    ]
    pieces = idle_pieces(record, number, window.stages_each[number], window.begin_s, window.end_s)
    for stage in range(window.stages_each[number]):
        mine = (column["instance"] == number) & (column["stage"] == stage)
        for mode in range(len(MODES)):
            of_mode = mine & (column["mode"] == mode)
            busy = union(column["start_s"][of_mode], column["end_s"][of_mode])
            shares.append(np.diff(covered(busy, edges_s)) if len(busy[0]) else np.zeros(BINS))
        for place in range(len(CAUSES)):
            idle = pieces.cause[stage] == place
            some = union(pieces.edges_s[:-1][idle], pieces.edges_s[1:][idle])
            shares.append(np.diff(covered(some, edges_s)) if len(some[0]) else np.zeros(BINS))
    whole = np.rint(np.clip(np.array(shares) / width_s, 0, 1) * 255).astype(np.uint8)
    return text_of(whole.tobytes())
