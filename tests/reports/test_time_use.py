"""Where the time went, against a second-by-second count; and where the CPU's phases lie, against what the run itself saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reports.metrics.host_lane import PROCESS, host_lane
from reports.metrics.time_use import BUSY, CAUSES, idle_pieces, time_use
from reports.record.load import load_runs
from reports.record.run_record import RunRecord
from reports.record.schema import CHUNK, RETRACTED
from tests.reports.records import iteration_row, record_of, request_row, toy_run
from tests.reports.simulated import SAMPLE, simulate


def two_stages() -> RunRecord:
    """Whole seconds; the CPU works from 0 to 2 (launch), 6 to 7 (process), 8 to 9 (launch), 15 to 16 (process).

    second   0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
    GPU 0        a a             b  b
    GPU 1            a a               b  b
    request  arrives at 0, leaves at 16; another comes at 18 and leaves at 20
    """
    requests = [
        request_row(request_id="a", arrival_s=0.0, scheduled_s=0.0, first_token_s=7.0, finish_s=16.0, output_tokens=2),
        request_row(request_id="b", arrival_s=18.0, scheduled_s=18.0, finish_s=20.0, status="aborted:client"),
    ]
    rows = [
        iteration_row(
            iteration=0, stage=0, launch_s=2.0, launch_host_s=2.0, start_s=2.0, end_s=4.0, running=1, process_s=1.0
        ),
        iteration_row(iteration=0, stage=1, launch_s=2.0, start_s=4.0, end_s=6.0, running=1),
        iteration_row(
            iteration=1,
            stage=0,
            mode=1,
            launch_s=9.0,
            launch_host_s=1.0,
            start_s=10.0,
            end_s=12.0,
            running=1,
            waiting=1,
            process_s=1.0,
        ),
        iteration_row(iteration=1, stage=1, mode=1, launch_s=9.0, start_s=12.0, end_s=14.0, running=1, waiting=1),
    ]
    return record_of(requests, rows, settings={"pp": 2, "tp": 2})


def test_two_stages_idle_for_the_causes_worked_out_by_hand() -> None:
    use = time_use(two_stages())
    assert use is not None and use.gpu_s == 40 and use.gpus_a_stage == 2
    assert use.busy_s == {"prefill": 4.0, "decode": 4.0, "mixed": 0.0}
    # No work: 16 to 18. Both stages wait for the CPU at 0-2, 6-7, 8-9, 14-15 (processing the result of b).
    # Requests queue from the launch at 9 on: what then idles without a reason of the CPU's is out of KV: stage 0 9-10,
    # 12-14, 15-16 and 18-20; stage 1 9-12, 15-16 and 18-20. Before that it is a bubble: stage 0 4-6 and 7-8, stage 1 2-4
    # and 7-8.
    assert use.idle_s == {"cpu": 10.0, "kv": 12.0, "bubble": 6.0, "none": 4.0, "other": 0.0, "peer": 0.0, "off": 0.0}
    assert sum(use.busy_s.values()) + sum(use.idle_s.values()) == use.gpu_s
    assert use.host_s == 5.0 and use.hidden_s == 0.0


def test_a_window_inside_a_run_begins_and_ends_where_it_is_asked_to() -> None:
    pieces = idle_pieces(two_stages(), 0, 2, 3.5, 8.5)
    assert pieces.edges_s[0] == 3.5 and pieces.edges_s[-1] == 8.5
    lengths_s, (first, _) = np.diff(pieces.edges_s), pieces.cause
    # Of stage 0: computing until 4, a bubble until 6, the CPU until 7, a bubble until 8, the CPU again.
    assert {name: lengths_s[first == place].sum() for place, name in ((BUSY, "busy"), *enumerate(CAUSES))} == {
        "busy": 0.5,
        "cpu": 1.5,
        "bubble": 3.0,
        "kv": 0.0,
        "none": 0.0,
        "other": 0.0,
        "peer": 0.0,
        "off": 0.0,
    }


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_causes_agree_with_looking_at_every_moment(loop: str) -> None:
    record = toy_run(loop, number=25, pp=2 if loop == "pipeline" else 1)
    use = time_use(record)
    assert use is not None
    column, requests = record.iterations, record.requests
    stages = column["stage"].max() + 1
    lane = host_lane(column, 0)
    begin_s, end_s = requests["arrival_s"].min(), requests["finish_s"].max()
    step_s = (end_s - begin_s) / 40_000
    at_s = begin_s + (np.arange(40_000) + 0.5) * step_s

    def inside(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        counted = np.searchsorted(np.sort(starts), at_s, side="right") - np.searchsorted(
            np.sort(ends), at_s, side="right"
        )
        return counted > 0

    works = inside(requests["arrival_s"], requests["finish_s"])
    on_cpu = inside(lane.begin_s, lane.end_s)
    rows = np.flatnonzero(column["stage"] == 0)
    last = rows[np.maximum(np.searchsorted(column["launch_s"][rows], at_s, side="right") - 1, 0)]
    queued = (column["waiting"][last] > 0) & (at_s >= column["launch_s"][rows[0]])
    busy = [
        inside(*(column[name][column["stage"] == stage] for name in ("start_s", "end_s"))) for stage in range(stages)
    ]
    counted = dict.fromkeys(CAUSES, 0.0)
    for stage in range(stages):
        idle = ~busy[stage]
        any_busy = np.logical_or.reduce(busy)
        none = idle & ~works
        cpu = idle & works & on_cpu & (~any_busy | (stage == 0))
        kv = idle & works & ~cpu & queued
        rest = idle & works & ~cpu & ~kv
        for cause, when in (("none", none), ("cpu", cpu), ("kv", kv), ("bubble" if stages > 1 else "other", rest)):
            counted[cause] += when.sum() * step_s
    for cause in CAUSES:
        assert use.idle_s[cause] == pytest.approx(counted[cause], abs=0.01 * (end_s - begin_s)), cause


def test_a_record_without_iterations_has_no_use_of_time() -> None:
    assert time_use(record_of([request_row(request_id="a", arrival_s=0.0, finish_s=1.0)])) is None


def test_tokens_computed_again_are_those_of_chunks_after_a_retraction() -> None:
    record = two_stages()
    events = {
        "request_id": ["a", "a", "a"],
        "instance": [0, 0, 0],
        "iteration": [0, 1, 1],
        "event": [CHUNK, RETRACTED, CHUNK],
        "tokens": [5, 0, 3],
    }
    rows = {**record.iterations, "prefill_tokens": np.array([5, 5, 3, 3]), "decode_tokens": np.array([0, 0, 1, 1])}
    use = time_use(RunRecord(record.meta, record.requests, rows, record.itl, events))
    assert use is not None and use.recomputed_tokens == 3
    assert use.recomputed_s == pytest.approx(4.0 * 3 / 4)


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_phases_lie_where_a_run_saw_them(tmp_path: Path, loop: str) -> None:
    layout = ("--pp", 2) if loop == "pipeline" else ("--tp", 2)
    folder = simulate(tmp_path / "o", SAMPLE, "--loop", loop, *layout, "--requests", 40)
    (record,) = load_runs([folder]).values()
    lane = host_lane(record.iterations, 0)
    assert (lane.begin_s[1:] >= lane.end_s[:-1]).all()
    processed = lane.kind == PROCESS
    ends = dict(
        zip(record.iterations["iteration"][lane.row[processed]].tolist(), lane.end_s[processed].tolist(), strict=True)
    )
    last_chunk = dict(zip(record.events["request_id"], record.events["iteration"].tolist(), strict=True))
    first_token = dict(zip(record.requests["request_id"], record.requests["first_token_s"].tolist(), strict=True))
    assert len(last_chunk) == 40
    for request_id, iteration in last_chunk.items():
        # A first token is out when the CPU has processed the batch that computed the end of its prompt.
        assert ends[iteration] == pytest.approx(first_token[request_id], abs=1e-9)
