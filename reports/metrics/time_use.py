"""The use of GPU time: what every stage computed at every moment, or why it stood still.

A stage that computes is busy, by the mode of its batch. One that does not is idle for the first of these reasons that holds:

* off: its instance starts, or is lost; time in which nobody pays for it does not count;
* no work: no request is in its instance;
* peer: all requests in it, which prefills or decodes alone, wait for their other instance, or for KV on its way;
* CPU: the CPU is at work, and the stage is the first one or no other stage computes, so it is the CPU it waits for;
* KV: requests queue that the scheduler could not admit although it may run more of them: their KV does not fit;
* bubble: with several stages, what it could compute is still on another one;
* other: none of these, e.g. waits that a real run did not record.

The reasons are exact: all intervals are cut at all of their ends, and every piece is judged once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reports.metrics.coming_and_going import out_of_service, paid_s
from reports.metrics.handovers import is_shared, presence
from reports.metrics.host_lane import first_stage_rows, host_lane_of
from reports.metrics.instances import pool_of, stage_weights
from reports.metrics.intervals import length, overlap, union
from reports.metrics.summary import run_span, run_window, work_intervals
from reports.record.run_record import RunRecord
from reports.record.schema import CHUNK, MODES, RETRACTED

CAUSES = ("cpu", "kv", "bubble", "none", "other", "peer", "off")
CAUSE_LABELS = {
    "cpu": "waiting for the CPU",
    "kv": "out of KV",
    "bubble": "pipeline bubble",
    "none": "no work",
    "other": "other",
    "peer": "for the other side",
    "off": "not in service",
}
CPU, KV, BUBBLE, NONE, OTHER, PEER, OFF = range(7)
BUSY = -1
_ROUNDING_S = 1e-8
"""Upper bound on what adding up times in floating point leaves."""


@dataclass
class TimeUse:
    """Seconds of all stages of all instances of a run; `busy_s` and `idle_s` add up to `gpu_s`.

    The GPUs of a tensor-parallel group are one stage and count once; `gpus_a_stage` is how many they are.
    """

    gpu_s: float
    gpus_a_stage: int = 1
    busy_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODES, 0.0))
    idle_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    host_s: float = 0.0
    """The CPUs of all instances at work."""
    hidden_s: float = 0.0
    """Part of that during which at least one stage of the instance computed."""
    recomputed_tokens: int = 0
    """Tokens computed again after retractions; 0 where the record does not say."""
    recomputed_s: float = 0.0
    """Their share of the time of the batches that held them, all stages."""

    def shares(self) -> dict[str, float | int | None]:
        """The numbers of the page's table (labels.GROUPS), as shares of all GPU time."""
        return {
            **{f"busy_{mode}_share": seconds / self.gpu_s for mode, seconds in self.busy_s.items()},
            **{f"idle_{cause}_share": seconds / self.gpu_s for cause, seconds in self.idle_s.items()},
            "cpu_hidden_share": self.hidden_s / self.host_s if self.host_s else None,
            "recomputed_tokens": self.recomputed_tokens,
        }


@dataclass(frozen=True)
class Pieces:
    """One instance's time cut into pieces between `edges_s`; `cause[stage]` of each is `BUSY` or a place in `CAUSES`."""

    edges_s: np.ndarray
    cause: list[np.ndarray]


def time_use(record: RunRecord, instances: Sequence[int] | None = None) -> TimeUse | None:
    """Account for the GPU time of a run, or of some of its ``instances``; None for a record without iterations.

    Where pools differ in the GPUs that are one stage, seconds are those of the smallest.
    """
    window = run_window(record)
    column = record.iterations
    if window is None or not len(column["iteration"]):
        return None
    gpus_a_stage, weights = stage_weights(record)
    chosen = range(window.instances) if instances is None else instances
    use = TimeUse(0.0, gpus_a_stage)
    for instance in chosen:
        weight, there_s = weights[instance], paid_s(record, instance, window.begin_s, window.end_s)
        use.gpu_s += weight * there_s * window.stages_each[instance]
        use.idle_s["off"] -= weight * (window.duration_s - there_s) * window.stages_each[instance]
        lane = host_lane_of(record, instance)
        cpu = union(lane.begin_s.clip(window.begin_s, window.end_s), lane.end_s.clip(window.begin_s, window.end_s))
        use.host_s += length(cpu)
        mine = column["instance"] == instance
        computing = union(
            column["start_s"][mine].clip(window.begin_s, window.end_s),
            column["end_s"][mine].clip(window.begin_s, window.end_s),
        )
        use.hidden_s += overlap(cpu, computing)
        pieces = idle_pieces(record, instance, window.stages_each[instance], window.begin_s, window.end_s)
        seconds = np.diff(pieces.edges_s)
        for stage, cause in enumerate(pieces.cause):
            for place, name in enumerate(CAUSES):
                use.idle_s[name] += weight * float(seconds[cause == place].sum())
            busy_s = weight * float(seconds[cause == BUSY].sum())
            here = mine & (column["stage"] == stage)
            by_mode = np.bincount(
                column["mode"][here], weights=(column["end_s"] - column["start_s"])[here], minlength=len(MODES)
            )
            total_s = float(by_mode.sum())
            for mode, name in enumerate(MODES):
                # On one stream batches do not run side by side; should a record say so, no moment counts twice.
                use.busy_s[name] += float(by_mode[mode]) * (busy_s / total_s if total_s > 0 else 0.0)
    if instances is None:
        use.recomputed_tokens, use.recomputed_s = _recomputed(record)
    use.idle_s = {cause: seconds if seconds >= _ROUNDING_S else 0.0 for cause, seconds in use.idle_s.items()}
    return use


def idle_pieces(record: RunRecord, instance: int, stages: int, begin_s: float, end_s: float) -> Pieces:
    """Find why each stage of `instance` was idle at each moment from `begin_s` to `end_s`.

    Worked out once for all of a run, of which most ask for nearly everything.
    """
    first_s, last_s = run_span(record) or (begin_s, end_s)
    if begin_s < first_s or end_s > last_s:  # beside a longer run
        return _idle_pieces(record, instance, stages, begin_s, end_s)
    key = "idle_pieces", instance, stages
    if key not in record.derived:
        record.derived[key] = _idle_pieces(record, instance, stages, first_s, last_s)
    return _cut(record.derived[key], begin_s, end_s)


def _cut(whole: Pieces, begin_s: float, end_s: float) -> Pieces:
    """The pieces between two moments."""
    first = int(np.searchsorted(whole.edges_s, begin_s, side="right")) - 1
    last = int(np.searchsorted(whole.edges_s, end_s, side="left"))
    edges_s = whole.edges_s[first : last + 1].copy()
    edges_s[0], edges_s[-1] = begin_s, end_s
    return Pieces(edges_s, [cause[first:last] for cause in whole.cause])


def _idle_pieces(record: RunRecord, instance: int, stages: int, begin_s: float, end_s: float) -> Pieces:
    column = record.iterations
    lane = host_lane_of(record, instance)
    mine = column["instance"] == instance

    def within(starts_s: np.ndarray, ends_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return union(starts_s.clip(begin_s, end_s), ends_s.clip(begin_s, end_s))

    work = work_intervals(record, instance, begin_s, end_s)
    cpu = within(lane.begin_s, lane.end_s)
    turned_away = within(*_not_admitted(record, instance, end_s))
    busy = []
    for stage in range(stages):
        here = mine & (column["stage"] == stage)
        busy.append(within(column["start_s"][here], column["end_s"][here]))
    there = within(*presence(record, instance, end_s)) if is_shared(record) else (np.empty(0), np.empty(0))
    edges_s = np.unique(
        np.concatenate([[begin_s, end_s], *work, *cpu, *turned_away, *there, *(e for each in busy for e in each)])
    )
    off = out_of_service(record, instance, begin_s, end_s)
    if off is not None:
        edges_s = np.unique(np.concatenate([edges_s, *off]))
    gone = _in(off, edges_s) if off is not None else np.zeros(len(edges_s) - 1, dtype=bool)
    has_work, on_cpu, blocked = _in(work, edges_s), _in(cpu, edges_s), _in(turned_away, edges_s)
    elsewhere = ~has_work & _in(there, edges_s)
    computes = [_in(each, edges_s) for each in busy]
    any_computes = np.logical_or.reduce(computes) if computes else np.zeros(len(edges_s) - 1, dtype=bool)
    causes = []
    for stage in range(stages):
        waits_for_cpu = on_cpu & (~any_computes | (stage == 0))
        rest = BUBBLE if stages > 1 else OTHER
        causes.append(
            np.select(
                [computes[stage], gone, elsewhere, ~has_work, waits_for_cpu, blocked],
                [BUSY, OFF, PEER, NONE, CPU, KV],
                default=rest,
            ).astype(np.int8)
        )
    return Pieces(edges_s, causes)


def _in(intervals: tuple[np.ndarray, np.ndarray], edges_s: np.ndarray) -> np.ndarray:
    """Tell which pieces between `edges_s` lie in one of the disjoint `intervals`, whose ends are all among the edges."""
    turns = np.zeros(len(edges_s), dtype=np.int8)
    turns[np.searchsorted(edges_s, intervals[0])] = 1
    turns[np.searchsorted(edges_s, intervals[1])] -= 1
    return np.cumsum(turns, dtype=np.int8)[:-1] > 0


def _not_admitted(record: RunRecord, instance: int, end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the times from one batch to the next where the first left requests queued though more might have run."""
    column = record.iterations
    rows = first_stage_rows(column, instance)
    pool, settings = pool_of(record, instance), record.meta.get("settings") or {}
    most = (pool.max_running if pool is not None else settings.get("max_running")) or np.inf
    left = (column["waiting"][rows] > 0) & (column["running"][rows] < most)
    from_s = column["launch_s"][rows]
    return from_s[left], np.append(from_s[1:], end_s)[left] if len(rows) else from_s[left]


def _recomputed(record: RunRecord) -> tuple[int, float]:
    events, column = record.events, record.iterations
    if RETRACTED not in events["event"]:
        return 0, 0.0
    tokens_of: dict[tuple[int, int], int] = {}
    lost: set[str] = set()
    for request_id, instance, iteration, event, tokens in zip(*events.values(), strict=True):
        if event == RETRACTED:
            lost.add(request_id)
        elif event == CHUNK and request_id in lost:
            key = (int(instance), int(iteration))
            tokens_of[key] = tokens_of.get(key, 0) + int(tokens)
    share = np.zeros(len(column["iteration"]))
    computed = np.maximum(column["prefill_tokens"] + column["decode_tokens"], 1)
    keys = zip(column["instance"].tolist(), column["iteration"].tolist(), strict=True)
    share[:] = [tokens_of.get(key, 0) for key in keys]
    seconds = float((share / computed * (column["end_s"] - column["start_s"])).sum())
    return sum(tokens_of.values()), seconds
