"""The HTML page: what its charts are given, that it is safe and repeatable, and that a browser draws it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from reports.compare.differing_settings import compare_settings, notes
from reports.metrics.summary import latency_samples, summarise
from reports.page.report_page import MOST_BYTES, write_report
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, read_record, write_record
from reports.timeline.series import latency_cdfs, over_time, run_over_time
from reports.timeline.windows import Bar, busiest_windows
from reports.verdict.caveats import caveats
from tests.reports.records import iteration_row, record_of, request_row, toy_run
from tests.reports.simulated import SAMPLE
from traces import open_trace
from traces.reshape import reshape
from workbench.cluster.simulate import simulate_loop
from workbench.settings.run_settings import RunSettings

COMMAND = 'workbench simulate trace.jsonl --note "</script><b>x"'


@pytest.fixture(scope="module")
def runs() -> dict[str, RunRecord]:
    return {
        loop: toy_run(loop, number=60, pp=2 if loop == "pipeline" else 1) for loop in ("normal", "overlap", "pipeline")
    }


@pytest.fixture(scope="module")
def page_path(runs: dict[str, RunRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, path, "Toy runs <compared>", COMMAND, slo_ttft_s=0.1)
    return path


def test_a_page_is_one_small_file_and_the_same_every_time(
    runs: dict[str, RunRecord], page_path: Path, tmp_path: Path
) -> None:
    again = tmp_path / "sub/again.html"
    write_report(runs, again, "Toy runs <compared>", COMMAND, slo_ttft_s=0.1)
    assert again.read_bytes() == page_path.read_bytes()
    assert len(page_path.read_bytes()) < MOST_BYTES
    assert [path.name for path in again.parent.iterdir()] == ["again.html"]


def test_the_page_of_a_run_that_was_written_and_read_back_is_the_same(tmp_path: Path) -> None:
    settings = RunSettings(model="Qwen/Qwen3-0.6B", requests=10)
    trace = reshape(open_trace(SAMPLE), settings.rate, settings.speedup, settings.requests)
    run = simulate_loop(settings, "overlap", trace, trace_sha256="", command="test")
    write_record(run, tmp_path / "overlap")
    for records, name in (({"overlap": run}, "fresh"), ({"overlap": read_record(tmp_path / "overlap")}, "read back")):
        write_report(records, tmp_path / f"{name}.html", "A run", COMMAND)
    assert (tmp_path / "fresh.html").read_bytes() == (tmp_path / "read back.html").read_bytes()


def test_nothing_on_the_page_points_outside_of_it(page_path: Path) -> None:
    text = page_path.read_text()
    assert not re.search(r"src\s*=|href\s*=\s*[^#\"]|href\s*=\s*\"[^#]|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_names_and_commands_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    record = toy_run(number=5)
    path = tmp_path / "report.html"
    write_report({"</script><script>alert(1)</script>": record}, path, "<i>", COMMAND)
    text = path.read_text()
    assert "<script>alert" not in text and "<i>" not in text.split("<body>")[0] and "</script><b>" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data and json.loads(data[1])["runs"] == ["</script><script>alert(1)</script>"]


def test_the_table_of_the_page_holds_every_metric(runs: dict[str, RunRecord], page_path: Path) -> None:
    text = page_path.read_text()
    for name, value in summarise(runs["pipeline"], slo_ttft_s=0.1).items():
        assert (f'data-metric="{name}"' in text) or not value


def test_many_long_runs_stay_below_two_megabytes(tmp_path: Path) -> None:
    record = toy_run(number=100)
    write_report({f"run {i}": record for i in range(24)}, tmp_path / "r.html", "t", "c")
    assert (tmp_path / "r.html").stat().st_size < MOST_BYTES


def test_a_page_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no run"):
        write_report({}, tmp_path / "r.html", "t", "c")


def test_a_run_in_which_nothing_happened_still_makes_a_page(tmp_path: Path) -> None:
    record = record_of([request_row(request_id="a", arrival_s=0.0, status="unfinished")])
    write_report({"a": record}, tmp_path / "r.html", "t", "c")
    assert "a finished 0 of 1 requests" in (tmp_path / "r.html").read_text()


def test_cdf_charts_are_exact_at_their_points(runs: dict[str, RunRecord]) -> None:
    charts = latency_cdfs(runs)
    for latency, chart in charts.items():
        assert len(chart["x"]) <= 2000 and chart["x"] == sorted(chart["x"])
        for name, shares in chart["runs"].items():
            values = np.repeat(*latency_samples(runs[name])[latency])
            for x, share in list(zip(chart["x"], shares, strict=True))[::20]:
                assert share == pytest.approx((values <= x * (1 + 1e-5)).mean(), abs=0.02)
            assert shares[-1] == 1


def test_charts_over_time_add_up_to_the_whole_run(runs: dict[str, RunRecord]) -> None:
    charts = over_time(runs)
    assert len(charts["t"]) <= 1000
    for name, record in runs.items():
        column, series = record.iterations, charts["runs"][name]
        last = column["stage"] == column["stage"].max()
        assert sum(series["decode_tokens"]) * charts["bucket_s"] == pytest.approx(
            column["decode_tokens"][last].sum(), rel=1e-3
        )
        busy_s = (column["end_s"] - column["start_s"]).sum() / (column["stage"].max() + 1)
        assert sum(series["busy"]) * charts["bucket_s"] == pytest.approx(busy_s, rel=1e-3)
        assert max(series["busy"]) <= 1.0001


def test_counts_over_time_are_means_that_fall_to_zero_when_work_is_done() -> None:
    request = request_row(request_id="a", arrival_s=0.0, scheduled_s=1.0, first_token_s=3.0, finish_s=3.5)
    rows = [
        iteration_row(start_s=1.0, end_s=2.0, running=2, waiting=4, kv_used_tokens=10, requests=2, prefill_tokens=8),
        iteration_row(
            iteration=1, mode=1, start_s=2.0, end_s=3.0, running=1, kv_used_tokens=12, requests=1, decode_tokens=1
        ),
    ]
    series = run_over_time(record_of([request], rows), np.array([0.0, 1.5, 3.0, 4.0]))
    assert series["running"].tolist() == pytest.approx([2 * 0.5 / 1.5, (0.5 * 2 + 1) / 1.5, 0.5])
    assert series["waiting"].tolist() == pytest.approx([4 * 0.5 / 1.5, 4 * 0.5 / 1.5, 0])
    assert series["kv"].tolist() == pytest.approx([10 * 0.5 / 1.5, (10 * 0.5 + 12) / 1.5, 12])  # the cache keeps it
    assert series["busy"].tolist() == pytest.approx([0.5 / 1.5, 1, 0])
    assert series["prefill"].tolist() == pytest.approx([0.5 / 1.5, 0.5 / 1.5, 0])
    assert series["prefill_tokens"].tolist() == pytest.approx([0, 8 / 1.5, 0])
    assert series["batch"].tolist()[:2] == [2, 1] and np.isnan(series["batch"][2])


def disjoint(bars: list[Bar]) -> bool:
    return all(later.begin_s >= earlier.end_s - 1e-9 for earlier, later in pairwise(bars))


def test_no_lane_of_the_timeline_does_two_things_at_once(runs: dict[str, RunRecord]) -> None:
    windows = busiest_windows(runs)
    assert len({round(window.end_s - window.begin_s, 9) for window in windows.values()}) == 1
    assert list(windows["normal"].lanes) == ["CPU", "GPU"]
    assert list(windows["pipeline"].lanes) == ["CPU", "GPU 0", "GPU 1"]
    for window in windows.values():
        for bars in window.lanes.values():
            assert 10 < len(bars) < 500 and disjoint(bars)


def test_the_timeline_shows_the_cpu_beside_the_gpu_only_where_the_loop_overlaps(runs: dict[str, RunRecord]) -> None:
    hidden_s = {}
    for name in ("normal", "overlap"):
        lanes = busiest_windows(runs)[name].lanes
        hidden_s[name] = sum(
            max(0.0, min(cpu.end_s, gpu.end_s) - max(cpu.begin_s, gpu.begin_s))
            for cpu in lanes["CPU"]
            for gpu in lanes["GPU"]
        )
    assert hidden_s["normal"] == pytest.approx(0, abs=1e-9)
    assert hidden_s["overlap"] > 0.005


def test_a_record_without_iterations_has_latencies_and_no_made_up_zeros(tmp_path: Path) -> None:
    measured = toy_run(number=20)
    record = RunRecord(measured.meta, measured.requests, record_of([]).iterations, measured.itl)
    series = over_time({"theirs": record})["runs"]["theirs"]
    assert all(value is None for values in series.values() for value in values)
    found = summarise(record)
    assert found["ttft_p99_s"] is not None and found["peak_running"] is None and found["gpu_decode_s"] is None
    write_report({"theirs": record}, tmp_path / "r.html", "t", "c")
    assert 'id="timeline"' not in (tmp_path / "r.html").read_text()


def test_settings_are_split_into_shared_and_differing(runs: dict[str, RunRecord]) -> None:
    differing, shared = compare_settings(runs)
    assert differing["settings.loop"] == ["normal", "overlap", "pipeline"]
    assert shared["model"] == "toy/model-1B" and shared["settings.chunk"] == "8192"
    assert notes(runs) == ["made up by tests/reports/records.py"]


def test_notes_of_cost_models_stand_on_the_page_with_the_runs_that_they_are_of() -> None:
    row = request_row(request_id="a", arrival_s=0.0, first_token_s=1.0, finish_s=2.0)
    said = {
        "one": ["outside what was measured"],
        "two": ["outside what was measured", "FP4 counted as FP8"],
        "three": [],
    }
    records = {name: record_of([row], trace={"notes": ["times began at 9"]}, cost_notes=said[name]) for name in said}
    assert notes(records) == ["times began at 9", "one, two: outside what was measured", "two: FP4 counted as FP8"]
    of_pools = {"pools": [{"name": "fast", "cost_notes": []}, {"name": "cheap", "cost_notes": ["far from measured"]}]}
    assert notes({"one": record_of([row], **of_pools)})[-1] == "pool cheap: far from measured"


def test_a_file_that_is_no_page_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("<html>mine</html>")
    with pytest.raises(RecordError, match="exists and is no page of workbench"):
        write_report({"a": toy_run(number=3)}, tmp_path / "r.html", "t", "c")
    assert (tmp_path / "r.html").read_text() == "<html>mine</html>"


def test_a_baseline_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no run is called b; the runs are a"):
        write_report({"a": toy_run(number=3)}, tmp_path / "r.html", "t", "c", baseline="b")


def test_the_page_says_what_makes_a_comparison_unfair_or_incomplete() -> None:
    here, there = toy_run(number=20), toy_run(number=25)
    assert (
        caveats({"a": here, "b": there})[0]
        == "These runs did not serve the same requests (a 20, b 25): compare with care."
    )
    measured = {"hardware": {"gpu": "H200", "simulated": False}, "totals": {"wall_s": 12.5}}
    no_gaps = (np.zeros(0), np.zeros(0, dtype=np.int64))
    real = RunRecord({**here.meta, **measured}, here.requests, record_of([]).iterations, no_gaps)
    assert caveats({"real": real, "model": here}) == [
        "real ran on real hardware in 12.5 s: its times are measured.",
        "The others are simulated: model.",
        "real has no iterations: nothing is known of its batches, its GPU or its CPU, only of its requests.",
        "real has no gaps between tokens: no ITL.",
        "model has no events: its requests' prefill is drawn in one piece, retractions are only counted.",
    ]
    loaded = RunRecord({**here.meta, "settings": {"rate": 4}}, here.requests, here.iterations, here.itl)
    assert caveats({"a": here, "b": loaded})[0] == (
        "These runs were given the same trace at different loads (a: as recorded; b: rate 4)."
    )
