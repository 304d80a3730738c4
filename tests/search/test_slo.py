"""What an SLO means, and when a run is known to have lost it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reports.metrics.summary import summarise
from tests.reports.records import record_of, request_row, toy_run
from workbench.recording.recorder import RequestRow
from workbench.search.slo import SloError, Watch, judge, measured_s, parse_slo


def test_latencies_percentiles_and_units_are_read():
    limits = parse_slo("ttft_p99=2s, tpot_p99=50ms,e2e_mean=90,queue_p99.9=800us")
    assert [limit.name for limit in limits] == ["ttft_p99", "tpot_p99", "e2e_mean", "queue_p99.9"]
    assert [limit.limit_s for limit in limits] == pytest.approx([2, 0.05, 90, 0.0008])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "ttf_p99=2s",
            "slo: ttf_p99 is not a latency (ttft, tpot, itl, e2e, queue) with _mean or _p99; did you mean ttft_p99?",
        ),
        ("ttft=2s", "slo: ttft is not a latency"),
        ("ttft_p99", "slo: ttft_p99: '' is not a time such as 2s or 50ms"),
        ("ttft_p99=2h", "slo: ttft_p99: '2h' is not a time"),
        ("ttft_p99=1.2.3s", "slo: ttft_p99: '1.2.3s' is not a time"),
        ("ttft_p99=0s", "slo: ttft_p99: the limit is not positive"),
        ("ttft_p101=1s", "slo: ttft_p101: there is no percentile 101"),
        ("ttft_p99=1s,ttft_p99=2s", "slo: ttft_p99 is given twice"),
        ("", "slo: '' is not a latency"),
    ],
)
def test_an_slo_that_says_nothing_is_one_line(text, says):
    with pytest.raises(SloError) as caught:
        parse_slo(text)
    assert str(caught.value).startswith(says)


def test_measured_latencies_are_those_of_the_report_when_every_request_finished():
    record = toy_run(number=80)
    numbers = summarise(record)
    for latency in ("ttft", "tpot", "itl", "e2e", "queue"):
        for part in ("mean", "p50", "p99"):
            limit = parse_slo(f"{latency}_{part}=1s")[0]
            assert measured_s(record, limit) == pytest.approx(numbers[f"{latency}_{part}_s"], rel=1e-12)


def test_a_request_that_never_finished_is_infinitely_late():
    rows = [
        request_row(request_id=str(i), arrival_s=0.0, scheduled_s=0.5, first_token_s=1.0, finish_s=2.0, output_tokens=5)
        for i in range(9)
    ]
    rows.append(request_row(request_id="lost", arrival_s=0.0, status="aborted:timeout"))
    record = record_of(rows)
    kept = judge(record, parse_slo("ttft_p50=1.5s"))
    lost = judge(record, parse_slo("ttft_p99=1.5s,e2e_mean=100s,tpot_p50=1s"))
    assert kept.kept and kept.measured_s == {"ttft_p50": 1.0}
    assert not lost.kept and set(lost.broken) == {"ttft_p99", "e2e_mean"}
    assert lost.measured_s["ttft_p99"] == math.inf


def _row(latency_s: float) -> RequestRow:
    row = RequestRow("r", "", 0, 0.0, 10, math.nan, math.nan, 0, 0)
    row.first_token_s = latency_s
    return row


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
@pytest.mark.parametrize("number", [1, 10, 101, 1000])
def test_a_watch_stops_only_what_is_lost_and_everything_that_is_lost_beyond_interpolation(percent, number):
    limit = parse_slo(f"ttft_p{percent}=1s")
    edge = number - math.floor((number - 1) * percent / 100)
    for late in sorted({0, 1, *range(max(edge - 3, 0), min(edge + 3, number) + 1), number // 2, number}):
        values = np.r_[np.full(number - late, 0.999), np.full(late, 1.001)]
        watch = Watch(limit, number, 10.0)
        stopped = watch(5.0, [_row(value) for value in values])
        above = np.percentile(values, percent, method="lower") > 1
        assert stopped == above
        if stopped:
            assert np.percentile(values, percent) > 1


def test_a_request_that_still_waits_counts_from_the_moment_it_is_late():
    limits = parse_slo("ttft_p50=1s")
    rows = [RequestRow(str(i), "", 0, 2.0, 10, math.nan, math.nan, 0, 0) for i in range(3)]
    assert not Watch(limits, 3, 10.0)(2.9, rows)
    watch = Watch(limits, 3, 10.0)
    assert watch(3.1, rows) and watch.broken == "ttft_p50"
