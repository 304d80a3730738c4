"""Times of a trace count from its first request, whatever they were counted from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.traces.written import json_lines
from traces import TraceError, open_trace
from traces.reshape import reshape
from traces.since_first import MOST_SPAN_S, SinceFirst


def own(path: Path, arrivals_s: list[Any], **more: Any) -> Path:
    records = [{"arrival_s": at_s, "input_length": 10, "output_length": 3, **more} for at_s in arrivals_s]
    path.write_text(json_lines(*records))
    return path


def times(path: Path) -> list[float | None]:
    return [request.arrival_s for request in open_trace(path)]


@pytest.mark.parametrize(
    ("arrivals_s", "expected"),
    [
        ([140738, 140738, 140740.5], [0, 0, 2.5]),
        ([0.3, 0.4, 0.7], [0, 0.1, 0.4]),  # not 0.10000000000000003
        ([19440110, 19440111], [0, 1]),
        ([1700000000.123, 1700000000.223, 1700000003.5], [0, 0.1, 3.377]),  # since 1970
        ([1700000000123, 1700000000223], [0, 100]),
        ([0, 3456000], [0, 3456000]),
    ],
)
def test_the_first_request_arrives_at_0_and_distances_are_those_of_the_file(tmp_path, arrivals_s, expected):
    assert times(own(tmp_path / "t.jsonl", arrivals_s)) == expected


def test_every_format_is_counted_from_its_first_request(tmp_path):
    (tmp_path / "burst.csv").write_text("Timestamp,Request tokens,Response tokens\n19440110,5,5\n19440112.5,5,5\n")
    (tmp_path / "vidur.csv").write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n1700000000.25,5,5\n1700000000.5,5,5\n"
    )
    ids = {"input_length": 5, "output_length": 5, "hash_ids": [1]}
    moon = [{"timestamp": 1700000000100, **ids}, {"timestamp": 1700000000101, **ids}]
    (tmp_path / "moon.jsonl").write_text(json_lines(*moon))
    since_1970_ns = 1700000000_000_000_000
    ns = [
        {
            "input_toks": 1,
            "output_toks": 1,
            "arrival_time_ns": since_1970_ns + n * 10**9,
            "input_tok_ids": [1],
            "output_tok_ids": [1],
        }
        for n in range(2)
    ]
    (tmp_path / "ns.jsonl").write_text(json_lines(*ns))
    assert times(tmp_path / "burst.csv") == [0, 2.5]
    assert times(tmp_path / "vidur.csv") == [0, 0.25]
    assert times(tmp_path / "moon.jsonl") == [0, 0.001]
    assert times(tmp_path / "ns.jsonl") == [0, 1]


def test_by_how_much_is_said_once_and_before_the_end(tmp_path):
    trace = open_trace(own(tmp_path / "t.jsonl", [140738, 140739, 140740]))
    for view in (trace, reshape(trace, speedup=2), reshape(trace, requests=2)):
        passing = iter(view)
        next(passing)
        said = [note for note in view.info.notes if "counted from there" in note]
        assert said == ["the first request arrives at 140738 s: times are counted from there"]
    open_at_0 = open_trace(own(tmp_path / "u.jsonl", [0, 1]))
    assert list(open_at_0) and open_at_0.info.notes == []


@given(st.floats(0, 1e10), st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_order_stays_and_distances_are_right_to_what_the_files_floats_hold(first_s, gaps_s):
    arrivals_s = [first_s]
    for gap_s in gaps_s:
        arrivals_s.append(arrivals_s[-1] + gap_s)
    clock = SinceFirst(first_s)
    since_s = [clock.since_s(at_s) for at_s in arrivals_s]
    assert since_s[0] == 0 and all(one <= other for one, other in pairwise(since_s))
    for at_s, counted_s in zip(arrivals_s, since_s, strict=True):
        assert counted_s == pytest.approx(at_s - first_s, abs=5e-6)


@pytest.mark.parametrize(
    ("arrivals_s", "more", "said"),
    [
        (
            [0, MOST_SPAN_S + 1],
            {},
            "line 2: arrives 4,000,000,001 s after the first request; a run lasts 4,000,000,000 s",
        ),
        ([0], {"slo_ttft_s": 1e12}, "line 1, slo_ttft_s: is 1,000,000,000,000 s; a run lasts"),
    ],
)
def test_a_time_that_no_run_lasts_is_refused(tmp_path, arrivals_s, more, said):
    path = own(tmp_path / "t.jsonl", arrivals_s, **more)
    with pytest.raises(TraceError, match=said):
        list(open_trace(path))


def test_a_rate_that_no_run_lasts_is_refused(tmp_path):
    trace = open_trace(own(tmp_path / "t.jsonl", [0, 1, 2]))
    with pytest.raises(TraceError, match="a run lasts 4,000,000,000 s at most: a rate of 1e-12/s makes it so"):
        list(reshape(trace, rate=1e-12))
    with pytest.raises(TraceError, match="a run lasts 4,000,000,000 s at most: a speedup of 1e-12 makes it so"):
        list(reshape(trace, speedup=1e-12))
    with pytest.raises(TraceError, match=r"line 2: arrives 1e\+300 s after the first request; a run lasts"):
        list(reshape(trace, rate=1e-300))
