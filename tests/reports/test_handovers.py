"""What a report says of requests that one instance prefills and another decodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reports.exports.trace_events import trace_events
from reports.metrics.handovers import STAGES, first_tokens
from reports.metrics.pool_use import pool_numbers
from reports.metrics.summary import summarise
from reports.metrics.time_use import time_use
from reports.record.run_record import RunRecord
from reports.record.schema import DECODE, PREFILL
from reports.timeline.waterfall import request_parts
from reports.verdict.pool_verdict import pool_sentences
from tests.reports.records import iteration_row, record_of, request_row


def pool(name: str, first: int, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "role": name,
        "count": 1,
        "first_instance": first,
        "gpu": "h100",
        "gpus": 1,
        "loop": "normal",
        "tp": 1,
        "pp": 1,
        "kv_tokens": 1000,
        "settings": {},
        **more,
    }


def by_hand(waiting: int = 0, **more: float) -> RunRecord:
    """Two requests over one prefill instance (0) and one decode instance (1), in whole seconds.

    a comes at 0, has pages at 2, is prefilled from 3 to 6, arrives at 8, is admitted at 9, decodes from 9 to 15.
    b comes at 1, has pages at 4, is prefilled from 6 to 10, arrives at 12, is admitted at 12, decodes from 12 to 20.
    """
    a = {
        "request_id": "a",
        "instance": 1,
        "prefill_instance": 0,
        "decode_instance": 1,
        "arrival_s": 0.0,
        "queued_s": 2.0,
        "scheduled_s": 3.0,
        "first_token_s": 9.0,
        "finish_s": 15.0,
        "input_tokens": 100,
        "output_tokens": 7,
        "bootstrap_s": 2.0,
        "prefill_start_s": 3.0,
        "prefill_end_s": 6.0,
        "transfer_start_s": 5.0,
        "transfer_end_s": 8.0,
        "decode_admission_s": 9.0,
    }
    b = {
        **a,
        "request_id": "b",
        "arrival_s": 1.0,
        "queued_s": 4.0,
        "scheduled_s": 6.0,
        "first_token_s": 12.0,
        "finish_s": 20.0,
        "output_tokens": 9,
        "bootstrap_s": 4.0,
        "prefill_start_s": 6.0,
        "prefill_end_s": 10.0,
        "transfer_start_s": 10.0,
        "transfer_end_s": 12.0,
        "decode_admission_s": 12.0,
    }
    rows = [
        iteration_row(instance=0, mode=PREFILL, launch_s=3.0, start_s=3.0, end_s=6.0, requests=1, prefill_tokens=100),
        iteration_row(
            iteration=1, instance=0, mode=PREFILL, launch_s=6.0, start_s=6.0, end_s=10.0, requests=1, prefill_tokens=100
        ),
        iteration_row(
            instance=1, mode=DECODE, launch_s=9.0, start_s=9.0, end_s=20.0, decode_tokens=1, waiting=waiting, running=1
        ),
    ]
    pools = [pool("prefill", 0), pool("decode", 1, kv_tokens=400, **more)]
    return record_of([request_row(**a), request_row(**b)], rows, pools=pools)


def test_the_stages_of_first_tokens_add_up_to_the_ttft_worked_out_by_hand():
    found = first_tokens(by_hand())
    assert found is not None
    # a: 2 for pages, 1 for a turn, 3 of prefill, 2 for the rest of its KV, 1 for a place; b: 3, 2, 4, 2, 0.
    assert found.mean_s() == {"bootstrap": 2.5, "wait": 1.5, "prefill": 3.5, "transfer": 2.0, "admission": 0.5}
    assert list(found.slow_s().values()) == [3.0, 2.0, 4.0, 2.0, 0.0], "b is the slower one"
    assert sum(found.mean_s().values()) == summarise(by_hand())["ttft_mean_s"]


def test_what_comes_after_a_first_token_of_the_prefill_side_is_no_part_of_the_ttft():
    record = by_hand()
    record.requests["first_token_s"] = record.requests["prefill_end_s"].copy()
    found = first_tokens(record)
    assert found is not None
    assert found.mean_s() == {"bootstrap": 2.5, "wait": 1.5, "prefill": 3.5, "transfer": 0.0, "admission": 0.0}


def test_each_side_is_idle_for_the_causes_worked_out_by_hand():
    record = by_hand()
    # Prefill: 0 to 2 both that are there wait for pages; 2 to 3 a has them; busy 3 to 10; 10 to 12 b's KV is on its way.
    prefill = time_use(record, [0])
    assert prefill is not None and prefill.gpu_s == 20
    assert prefill.busy_s["prefill"] == 7
    assert {cause: idle for cause, idle in prefill.idle_s.items() if idle} == {"peer": 4.0, "none": 8.0, "other": 1.0}
    # Decode: until 8 nothing has arrived, 8 to 9 a has, busy 9 to 20.
    decode = time_use(record, [1])
    assert decode is not None and decode.busy_s["decode"] == 11
    assert {cause: idle for cause, idle in decode.idle_s.items() if idle} == {"peer": 8.0, "other": 1.0}


def test_busy_exposed_and_idle_shares_of_a_pair_add_up_to_one():
    found = summarise(by_hand())
    assert found["gpu_busy_share"] == pytest.approx(18 / 40)
    # Of 40 s of two GPUs nobody could compute anything in 2 + 10 of the one and 8 of the other.
    assert found["no_work_share"] == pytest.approx(20 / 40)
    assert found["gpu_busy_share"] + found["cpu_exposed_share"] + found["no_work_share"] == pytest.approx(1)


def test_a_second_of_a_stage_of_four_gpus_counts_four_times_that_of_one():
    record = by_hand()
    meta = {**record.meta, "pools": [pool("prefill", 0), pool("decode", 1, tp=4, gpus=4)]}
    wide = replace(record, meta=meta)
    assert summarise(wide)["gpu_busy_share"] == pytest.approx((7 + 4 * 11) / (20 + 4 * 20))
    use = time_use(wide)
    assert use is not None and use.gpus_a_stage == 1 and use.gpu_s == 100
    assert sum(use.busy_s.values()) + sum(use.idle_s.values()) == pytest.approx(100)


def test_a_pool_that_prefills_has_the_requests_it_was_sent_and_writes_nothing():
    prefill, decode = pool_numbers(by_hand())
    assert (prefill["requests"], prefill["input_tokens"], prefill["output_tokens"]) == (2, 200, None)
    assert (decode["requests"], decode["output_tokens"]) == (2, 16)
    assert prefill["tpot_mean_s"] is None and decode["tpot_mean_s"] == 1.0


def test_the_time_of_a_shared_request_is_divided_into_what_it_waited_for():
    parts = request_parts(by_hand())[0]
    assert [(part.kind, part.begin_s, part.end_s) for part in parts] == [
        ("bootstrap", 0.0, 2.0),
        ("queued", 2.0, 3.0),
        ("prefill", 3.0, 9.0),  # no chunks are recorded here
        ("decode", 9.0, 15.0),
    ]
    record = by_hand()
    events = {
        "request_id": ["a", "b"],
        "instance": np.array([0, 0]),
        "iteration": np.array([0, 1]),
        "event": ["prefill", "prefill"],
        "tokens": np.array([100, 100]),
    }
    parts = request_parts(replace(record, events=events))[0]
    assert [(part.kind, part.begin_s, part.end_s) for part in parts] == [
        ("bootstrap", 0.0, 2.0),
        ("queued", 2.0, 3.0),
        ("prefill", 3.0, 6.0),
        ("transfer", 6.0, 8.0),
        ("admission", 8.0, 9.0),
        ("decode", 9.0, 15.0),
    ]


def moved(record: RunRecord, **by: float) -> RunRecord:
    """The same with every moment of a stage and those after it later."""
    order = ("bootstrap_s", "prefill_start_s", "prefill_end_s", "transfer_end_s", "first_token_s")
    requests = dict(record.requests)
    for stage, seconds in by.items():
        for name in [*order[STAGES.index(stage) :], "decode_admission_s", "finish_s"]:
            requests[name] = requests[name] + seconds
    return replace(record, requests=requests)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            moved(by_hand(), bootstrap=-2.0, wait=-1.0, transfer=-1.0),
            "neither side is short, and the prefill pool has the most to spare",
        ),
        (
            moved(by_hand(waiting=1, max_running=0), bootstrap=9.0),
            "the decode pool is short: 63.2% of the mean TTFT is ",
        ),
        (
            moved(by_hand(), bootstrap=9.0),
            "no side is short: 63.2% of the mean TTFT passes until the loop of the decode",
        ),
        (moved(by_hand(), transfer=20.0), "the link between the prefill pool and the decode pool is short: 73.3% of"),
    ],
)
def test_the_verdict_names_the_side_that_first_tokens_wait_for(record, said):
    lines = pool_sentences({"run": record})
    assert any(line.startswith(f"run: {said}") for line in lines), lines


def test_kv_on_its_way_is_a_track_of_its_sender_in_a_trace_for_perfetto():
    events = [text for text in trace_events({"run": by_hand()}) if '"kv transfer"' in text]
    assert len(events) == 4
    assert '"name":"KV to decode 0"' in events[0] and '"ts":5000000.000' in events[0]
    assert '"ts":8000000.000' in events[1] and '"ph":"e"' in events[1]
