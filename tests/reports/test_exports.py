"""Trace events against the rules of the format, and figures."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.exports.figures import FORMATS, write_figures
from reports.exports.trace_events import write_trace_events
from reports.metrics.report_numbers import make_report
from reports.record.errors import RecordError
from reports.record.load import load_runs
from reports.record.run_record import RunRecord
from reports.timeline.waterfall import request_parts
from tests.reports.records import record_of, toy_run
from tests.reports.simulated import SAMPLE, simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two loops short of memory: requests are retracted; and two instances."""
    flags = (
        "--loop",
        "overlap,pipeline",
        "--tp",
        2,
        "--dp",
        2,
        "--requests",
        80,
        "--kv-tokens",
        6000,
        "--max-context",
        6000,
        "--batching",
        "mixed",
        "--speedup",
        8,
    )
    return simulate(tmp_path_factory.mktemp("runs") / "o", SAMPLE, *flags)


@pytest.fixture(scope="module")
def events(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("trace") / "t.json.gz"
    records = load_runs([folder])
    number = write_trace_events(records, path)
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert len(found) == number
    again = path.with_name("again.json.gz")
    write_trace_events(records, again)
    assert again.read_bytes() == path.read_bytes()
    return found


def test_every_event_has_the_keys_its_phase_requires(events: list[dict[str, Any]]) -> None:
    required = {"X": {"dur"}, "M": {"args"}, "C": {"args"}, "b": {"id", "cat"}, "e": {"id", "cat"}}
    assert {event["ph"] for event in events} == set(required)
    for event in events:
        assert {"name", "ph", "pid", "tid", "ts"} | required[event["ph"]] <= set(event), event
        assert event["ts"] >= 0 and event.get("dur", 1) > 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def test_events_are_in_order_of_time(events: list[dict[str, Any]]) -> None:
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    phases = [event["ph"] for event in events]
    assert "M" not in phases[phases.index("X") :]  # names come before what they name


def test_bars_of_a_thread_lie_one_after_the_other(events: list[dict[str, Any]]) -> None:
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000)))
    assert len(threads) == 2 * 2 + 2 * 3  # CPU and one GPU, CPU and two stages, of two instances each
    for bars in threads.values():
        ends = [begin + lasts for begin, lasts in bars]
        assert all(later[0] >= end for later, end in zip(bars[1:], ends[:-1], strict=True))


def test_what_begins_ends_and_nests(events: list[dict[str, Any]]) -> None:
    open_: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for event in events:
        if event["ph"] == "b":
            if not open_[event["id"]]:
                assert event["name"] == event["id"].split("/", 1)[1]
            open_[event["id"]].append(event["name"])
            seen.add(event["name"])
        elif event["ph"] == "e":
            assert open_[event["id"]].pop() == event["name"], event
    assert not any(open_.values())
    assert {"queued", "prefill", "decode", "retracted"} <= seen


def test_threads_and_processes_are_named(events: list[dict[str, Any]]) -> None:
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert used <= set(names) and {"CPU", "GPU", "GPU 0", "GPU 1"} == set(names.values())
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == [f"{run}, instance {i}" for run in ("overlap", "pipeline") for i in (0, 1)]


def test_bars_are_the_lines_of_the_csv_file(folder: Path, events: list[dict[str, Any]]) -> None:
    steps = pd.read_csv(folder / "overlap/iterations.csv")
    bars = [event for event in events if event["ph"] == "X" and event["cat"] == "gpu" and event["pid"] == 1]
    mine = steps[steps.instance == 0].sort_values("start_s")
    assert np.allclose([bar["ts"] for bar in bars], mine.start_s * 1e6, atol=2e-3)
    assert np.allclose([bar["dur"] for bar in bars], (mine.end_s - mine.start_s) * 1e6, atol=2e-3)
    assert [bar["name"] for bar in bars] == mine["mode"].tolist()
    assert [bar["args"]["context_tokens"] for bar in bars] == mine.context_tokens.tolist()
    host_s = sum(bar["dur"] for bar in events if bar["ph"] == "X" and bar["cat"] == "cpu" and bar["pid"] == 1) / 1e6
    phases = mine[["receive_s", "schedule_s", "launch_host_s", "process_s"]].to_numpy().sum()
    assert host_s == pytest.approx(phases, rel=1e-3)


def test_the_parts_of_a_request_fill_its_time_without_gaps(folder: Path) -> None:
    for record in load_runs([folder]).values():
        chunks = pd.read_csv(folder / record.name / "events.csv", dtype={"request_id": str})
        for row, parts in enumerate(request_parts(record)):
            assert parts[0].begin_s == record.requests["arrival_s"][row]
            assert parts[-1].end_s == pytest.approx(record.requests["finish_s"][row])
            assert all(one.end_s == pytest.approx(two.begin_s) for one, two in pairwise(parts))
            mine = chunks[chunks.request_id == record.requests["request_id"][row]]
            assert sum(part.tokens for part in parts if part.kind == "prefill") == mine.tokens.sum()
            assert sum(part.kind == "retracted" for part in parts) == record.requests["retractions"][row]


def test_a_run_without_iterations_has_request_tracks_only(tmp_path: Path) -> None:
    few = toy_run(number=10)
    record = RunRecord(few.meta, few.requests, record_of([]).iterations, few.itl)
    write_trace_events({"theirs": record}, tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["ph"] for event in found} == {"M", "b", "e"}


def test_an_export_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"):
        write_trace_events({"a": toy_run(number=3)}, tmp_path / "file" / "t.json")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.slow
def test_figures_are_drawn_and_the_same_every_time(tmp_path: Path, file_format: str) -> None:
    report = make_report({loop: toy_run(loop, number=30) for loop in ("normal", "overlap")})
    files = write_figures(report, tmp_path / "one", file_format)
    assert [file.stem for file in files] == ["latency", "over_time", "time_use", "timeline"]
    for file, again in zip(files, write_figures(report, tmp_path / "two", file_format), strict=True):
        assert file.stat().st_size > 5000
        assert file.read_bytes() == again.read_bytes()


def test_every_axis_of_a_figure_has_a_unit(tmp_path: Path) -> None:
    from reports.exports.figures import latency_figure, over_time_figure, time_use_figure

    report = make_report({loop: toy_run(loop, number=30) for loop in ("normal", "overlap")})
    labels = [axis.get_xlabel() for axis in latency_figure(report).axes]
    assert all(label.endswith(("(ms)", "(s)")) for label in labels)
    over_time = over_time_figure(report)
    assert over_time is not None and all(axis.get_ylabel() for axis in over_time.axes)
    time_use = time_use_figure(report)
    assert time_use is not None and time_use.axes[0].get_xlabel() == "share of GPU time (%)"


def test_figures_of_a_run_without_iterations_are_those_of_its_requests(tmp_path: Path) -> None:
    few = toy_run(number=20)
    record = RunRecord(few.meta, few.requests, record_of([]).iterations, few.itl)
    files = write_figures(make_report({"theirs": record}), tmp_path, "png")
    assert [file.stem for file in files] == ["latency", "over_time"]
