"""Reports of runs of any length: from a microsecond to a lifetime, wherever their clock began."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np
import pytest

from reports.exports.trace_events import write_trace_events
from reports.metrics.report_numbers import make_report
from reports.metrics.summary import summarise
from reports.page.report_page import page_html
from reports.record.first_arrival import from_first_arrival
from reports.record.run_record import RunRecord, read_record, write_record
from reports.record.schema import DECODE, PREFILL, REQUEST_COLUMNS, Kind
from reports.timeline.packed import MOST, packed, tick_s_of
from tests.reports.records import iteration_row, record_of, request_row

DAY_S = 86400.0


def unpacked(table: dict[str, Any]) -> dict[str, np.ndarray]:
    """What core.js makes of a packed table, in JavaScript's floats."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(table["data"])), np.uint8)
    columns, at, rows = {}, 0, table["rows"]
    for name, planes in table["columns"]:
        values = np.zeros(rows)
        for plane in range(planes):
            values += raw[at : at + rows] * 256.0**plane
            at += rows
        columns[name] = np.where(values % 2 == 0, values / 2, -(values + 1) / 2)
    return columns


def two_requests(begin_s: float, apart_s: float, takes_s: float) -> RunRecord:
    """One request, and another `apart_s` after it; each is computed in two batches."""
    rows, iterations = [], []
    for number in range(2):
        at_s = begin_s + number * apart_s
        middle_s, end_s = at_s + takes_s / 2, at_s + takes_s
        rows.append(
            request_row(
                request_id=f"r{number}",
                arrival_s=at_s,
                queued_s=at_s,
                scheduled_s=at_s,
                first_token_s=middle_s,
                finish_s=end_s,
                input_tokens=10,
                output_tokens=2,
            )
        )
        for place, (mode, start_s, stop_s) in enumerate(((PREFILL, at_s, middle_s), (DECODE, middle_s, end_s))):
            iterations.append(
                iteration_row(
                    iteration=2 * number + place,
                    mode=mode,
                    launch_s=start_s,
                    start_s=start_s,
                    end_s=stop_s,
                    requests=1,
                    prefill_tokens=10 * (mode == PREFILL),
                    decode_tokens=int(mode == DECODE),
                    running=1,
                )
            )
    return record_of(rows, iterations, {takes_s / 2: 2})


def data_of(record: RunRecord) -> dict[str, Any]:
    text = page_html(make_report({"run": record}), "title")
    found = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


SPANS = [
    (0.0, 1e-6, 4e-7),
    (0.0, 1e-3, 1e-4),
    (0.0, 140737.0, 1.0),
    (0.0, 140738.0, 1.0),
    (0.0, 40 * DAY_S, 0.5),
    (0.0, 3 * 365 * DAY_S, 2.0),
    (0.0, 3_900_000_000.0, 2.0),
    (140738.0, 1.0, 0.25),
    (1_700_000_000.0, 10.0, 0.5),
    (-3.0, 200_000.0, 0.5),
]


@pytest.mark.parametrize(("begin_s", "apart_s", "takes_s"), SPANS)
def test_a_run_of_any_span_is_reported_with_its_times(tmp_path, begin_s, apart_s, takes_s):
    record = two_requests(begin_s, apart_s, takes_s)
    write_record(record, tmp_path / "run")
    record = read_record(tmp_path / "run")
    summary = summarise(record)
    coarse_s = max(2e-9, (abs(begin_s) + apart_s) * 1e-15)
    assert summary["duration_s"] == pytest.approx(apart_s + takes_s, abs=coarse_s)
    assert summary["e2e_p50_s"] == pytest.approx(takes_s, abs=2 * coarse_s)
    data = data_of(record)
    table = data["requests"]
    tick_s = table["tick_s"]
    columns = unpacked(table["runs"]["run"]["requests"])
    arrivals_s = np.cumsum(columns["arrival_s"]) * tick_s
    assert arrivals_s.tolist() == pytest.approx([0, apart_s], abs=2 * tick_s + coarse_s)
    assert (columns["finish_s"] * tick_s).tolist() == pytest.approx([takes_s] * 2, abs=2 * tick_s + 2 * coarse_s)
    detail = data["timeline"]["run"]
    (instance,) = detail["instances"]
    batches = unpacked(instance)
    lasts = np.cumsum(batches["lasts0"])
    ends = np.cumsum(batches["start0"] + lasts) * instance["tick_s"]
    assert ends[-1] == pytest.approx(apart_s + takes_s, abs=4 * instance["tick_s"] + coarse_s)
    assert detail["begin_s"] == 0 and detail["end_s"] == pytest.approx(apart_s + takes_s, abs=coarse_s)
    assert write_trace_events({"run": record}, tmp_path / "events.json.gz") > 8


def test_a_gap_of_weeks_is_time_without_work():
    use = make_report({"run": two_requests(0.0, 40 * DAY_S, 0.5)}).uses["run"]
    assert use is not None
    assert use.idle_s["none"] == pytest.approx(40 * DAY_S - 0.5, abs=1e-6)
    assert sum(use.busy_s.values()) == pytest.approx(1.0, abs=1e-6)


def test_a_page_counts_from_the_first_arrival_and_says_so():
    late = two_requests(140738.0, 1.0, 0.25)
    shown = from_first_arrival(late)
    assert shown.requests["arrival_s"].tolist() == [0, 1] and shown.iterations["start_s"][0] == 0
    assert from_first_arrival(shown) is shown
    moments = [name for name, kind in REQUEST_COLUMNS.items() if kind is Kind.TIME and not name.startswith("slo_")]
    every = from_first_arrival(record_of([request_row(**dict.fromkeys(moments, 7.0), slo_ttft_s=7.0)]))
    assert {name: every.requests[name][0] for name in moments} == dict.fromkeys(moments, 0.0)
    assert every.requests["slo_ttft_s"][0] == 7
    text = page_html(make_report({"late": late}), "title")
    assert "clock stood at 140,738.0 s when its first request came: times here count from there." in text


@pytest.mark.parametrize("span_s", [0.0, 1e-6, 1.0, 26 * DAY_S, 27 * DAY_S, 4e9, 8e9])
def test_all_differences_of_moments_can_be_packed_in_the_tick_of_their_span(span_s):
    tick_s = tick_s_of(span_s)
    assert tick_s == 1e-9 if span_s <= 26 * DAY_S else tick_s > 1e-9
    ticks = np.rint(np.array([span_s, -span_s]) / tick_s).astype(np.int64)
    assert unpacked(packed({"a": ticks}))["a"].tolist() == ticks.tolist()


def test_the_largest_numbers_come_back_and_larger_ones_are_refused():
    numbers = np.array([MOST, -MOST, MOST - 1, 1 - MOST, 0], np.int64)
    assert unpacked(packed({"a": numbers}))["a"].tolist() == numbers.tolist()
    with pytest.raises(ValueError, match="too large to pack"):
        packed({"a": np.array([MOST + 1], np.int64)})
