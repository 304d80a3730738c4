"""Requests that a program gives are a trace like any other, or one line says which of them is none."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from traces import Trace, TraceError, TraceRequest, open_trace, sample_path, trace_of
from traces.in_memory import in_memory
from traces.requests.content import TokenIds
from traces.write import record_of, write_trace


def records(trace: Trace) -> list[dict]:
    return [record_of(request) for request in trace]


def test_the_requests_of_a_file_given_by_a_program_are_the_trace_that_the_file_is(tmp_path: Path) -> None:
    read = open_trace(sample_path())
    given = trace_of(list(read), name="sample")
    assert records(given) == records(read) == records(given)
    assert given.info.closed_loop == read.info.closed_loop and given.info.name == "sample"
    write_trace(read, tmp_path / "again.jsonl")
    assert given.sha256() == hashlib.sha256((tmp_path / "again.jsonl").read_bytes()).hexdigest()
    assert records(pickle.loads(pickle.dumps(in_memory(given)))) == records(read)


def test_times_count_from_the_first_and_the_programs_requests_stay_as_they_are() -> None:
    mine = [TraceRequest("a", 100.0, 5, 2), TraceRequest("b", 101.5, 5, 2)]
    trace = trace_of(mine)
    assert [request.arrival_s for request in trace] == [0.0, 1.5]
    assert [request.arrival_s for request in mine] == [100.0, 101.5]
    assert any("100" in note for note in trace.info.notes)


def test_numbers_of_numpy_are_taken_as_what_they_are() -> None:
    mine = [
        TraceRequest("a", np.float64(0.5), np.int64(5), np.int32(2), priority=np.int16(3), slo_ttft_s=np.float32(0.5))
    ]
    (request,) = trace_of(mine)
    values = (request.arrival_s, request.input_length, request.output_length, request.priority, request.slo_ttft_s)
    assert values == (0.0, 5, 2, 3, 0.5) and [type(value) for value in values] == [float, int, int, int, float]


def test_without_an_order_arrivals_may_go_back() -> None:
    mine = [TraceRequest("a", 1.0, 5, 2), TraceRequest("b", 0.0, 5, 2)]
    assert len(list(trace_of(mine, ordered=False))) == 2
    with pytest.raises(TraceError, match=r"^requests: arrivals go back at request 'b'"):
        list(trace_of(mine))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "requests: holds no requests"),
        ([{"request_id": "a"}], r"requests, \[0\]: is \"{'request_id': 'a'}\" of type dict, not a TraceRequest"),
        ([TraceRequest("", 0.0, 1, 1)], r"requests, \[0\].request_id: is missing"),
        ([TraceRequest("a", 0.0, -1, 1)], r"requests, \[0\].input_length: '-1' is negative"),
        ([TraceRequest("a", 0.0, 1, 0)], r"requests, \[0\].output_length: is 0"),
        ([TraceRequest("a", 0.0, 1, 1, max_tokens=0)], r"requests, \[0\].max_tokens: is 0"),
        ([TraceRequest("a", None, 1, 1)], r"requests, \[0\].session_id: is missing"),
        ([TraceRequest("a", None, 1, 1, session_id="s")], r"requests, \[0\].arrival_s: is missing"),
        ([TraceRequest("a", 0.0, 1, 1, priority=0.5)], r"requests, \[0\].priority: '0.5' is not an integer"),
        ([TraceRequest("a", 0.0, 1, 1, slo_ttft_s=-1.0)], r"requests, \[0\].slo_ttft_s: '-1.0' is negative"),
        ([TraceRequest("a", float("nan"), 1, 1)], r"requests, \[0\].arrival_s: "),
        ([TraceRequest("a", 0.0, 1, 1)] * 2, r"requests, request_id: 'a' appears twice"),
        (
            [TraceRequest("a", 0.0, 1, 1, session_id="s", turn=1)],
            r"requests, \[0\].turn: is 1, and session 's' goes on with 0",
        ),
        ([TraceRequest("a", 0.0, 1, 1, session_id="s", think_time_s=-1)], r"requests, \[0\].think_time_s: "),
        (
            [TraceRequest("a", 0.0, 3, 1, content=TokenIds(np.array([7, 8], np.int32), None, "here"))],
            r"requests, \[0\].input_length: is 3, and there are 2 token ids",
        ),
    ],
)
def test_what_is_no_request_is_one_line(requests: list, message: str) -> None:
    with pytest.raises(TraceError, match="^" + message):
        list(trace_of(requests))
