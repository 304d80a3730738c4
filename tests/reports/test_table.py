"""The terminal table, the JSON and the verdict."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from reports.exports.runs_json import to_json
from reports.metrics.labels import METRICS, difference, percent, written
from reports.metrics.labels import Unit as U
from reports.metrics.summary import summarise
from reports.metrics.time_use import time_use
from reports.terminal.compact_table import compact_table
from reports.terminal.full_table import comparison_table
from reports.verdict.verdict import verdict
from tests.reports.records import record_of, request_row, toy_run


@pytest.fixture(scope="module")
def summaries() -> dict[str, dict]:
    runs = {
        loop: toy_run(loop, number=60, pp=2 if loop == "pipeline" else 1) for loop in ("normal", "overlap", "pipeline")
    }
    return {name: summarise(run, slo_ttft_s=0.1) for name, run in runs.items()}


def printed(summaries: dict[str, dict], width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(comparison_table(summaries))
    return file.getvalue().splitlines()


def test_three_runs_fit_into_eighty_columns_without_wrapping(summaries: dict[str, dict]) -> None:
    lines = printed(summaries)
    assert lines == [line.rstrip() + " " * (len(line) - len(line.rstrip())) for line in printed(summaries, width=200)]
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[0].split() == ["normal", "overlap", "pipeline"]


def test_a_row_marks_its_best_value_and_compares_with_the_first_run(summaries: dict[str, dict]) -> None:
    made = {"a": {"tpot_mean_s": 0.010}, "b": {"tpot_mean_s": 0.005}, "c": {"tpot_mean_s": 0.015}}
    (row,) = [line for line in printed(made) if "TPOT mean" in line]
    assert row.split() == ["TPOT", "mean", "10.00", "ms", "5.00", "ms*", "-50.0%", "15.00", "ms", "+50.0%"]


def test_nothing_is_best_when_all_are_alike_or_alone() -> None:
    for made in ({"a": {"ttft_mean_s": 1.0}, "b": {"ttft_mean_s": 1.0}}, {"a": {"ttft_mean_s": 1.0}}):
        (row,) = [line for line in printed(made) if "TTFT mean" in line]
        assert "*" not in row


def test_every_metric_of_a_summary_has_a_label(summaries: dict[str, dict]) -> None:
    use = time_use(toy_run("overlap", number=20))
    assert use is not None
    assert set(METRICS) == {*summaries["normal"], *use.shares()}


@pytest.mark.parametrize(
    ("values", "unit", "texts"),
    [
        ([0.0123, 1.5], U.SECONDS, ["0.012 s", "1.500 s"]),
        ([0.0123, None], U.SECONDS, ["12.30 ms", "-"]),
        ([5e-6], U.SECONDS, ["5.0 µs"]),
        ([0.123], U.SHARE, ["12.3%"]),
        ([16738.04, 2], U.TOKENS_PER_S, ["16,738 tok/s", "2 tok/s"]),
        ([5.561, 12.34], U.COUNT, ["5.56", "12.3"]),
    ],
)
def test_values_are_written_in_units_that_suit_them(values: list, unit: U, texts: list[str]) -> None:
    assert written(values, unit) == texts


def test_differences_are_readable_at_any_size() -> None:
    sizes = [None, 0.0, 0.0001, 0.25, -0.5, 11.0]
    assert [percent(size, signed=True) for size in sizes] == ["", "±0%", "±0%", "+25.0%", "-50.0%", "x12"]
    assert difference(1, 0) is None and difference(None, 1) is None


def test_json_holds_the_same_numbers_and_where_the_records_are(summaries: dict[str, dict]) -> None:
    made = json.loads(to_json(summaries, {"normal": "out/normal"}, "out/report.html"))
    assert made["runs"]["normal"] == {"folder": "out/normal", "metrics": summaries["normal"]}
    assert made["runs"]["overlap"]["folder"] is None and made["report"] == "out/report.html"
    assert made["verdict"] == verdict(summaries)


def test_the_verdict_says_who_wins_by_how_much_and_that_the_cpu_is_why(summaries: dict[str, dict]) -> None:
    text = "\n".join(verdict(summaries))
    normal, overlap, pipeline = summaries.values()
    ratio = 1 - overlap["tpot_mean_s"] / pipeline["tpot_mean_s"]
    assert re.search(rf"overlap has the lowest mean TPOT: .* {ratio * 100:.1f}% below pipeline", text)
    assert f"In normal the GPU stands idle {normal['cpu_exposed_share'] * 100:.1f}% of the time" in text
    assert f"In pipeline the stages idle {pipeline['bubble_share'] * 100:.1f}%" in text


def test_the_verdict_names_every_cause_the_numbers_show() -> None:
    base = {"requests_total": 10, "requests_finished": 10, "output_throughput": 100.0, "ttft_mean_s": 2.0}
    made = {
        "a": base | {"cache_hit_rate": 0.5, "queue_mean_s": 1.5, "retractions": 0},
        "b": base
        | {
            "cache_hit_rate": 0.1,
            "queue_mean_s": 0.1,
            "retractions": 1200,
            "requests_finished": 7,
            "requests_aborted": 2,
            "requests_unfinished": 1,
            "output_throughput": 250.0,
        },
    }
    assert verdict(made) == [
        "b finished 7 of 10 requests (2 aborted, 1 unfinished); its latencies and throughput count the finished ones.",
        "b has the highest output throughput: 250 tok/s, 2.5 times, or 150% above a (100 tok/s).",
        "The prefix cache spares a 50.0% of its input tokens, b 10.0%.",
        "Requests lost their KV, to memory pressure or to a higher priority, and were computed again 1,200 times in b.",
        "Most of the mean TTFT is queueing before the first batch (75.0% in a): capacity is short.",
    ]


def test_queueing_without_anybody_left_behind_is_not_called_a_lack_of_capacity() -> None:
    queued = {"ttft_mean_s": 2.0, "queue_mean_s": 1.5}
    made = {"full": queued | {"peak_waiting": 3}, "late": queued | {"peak_waiting": 0}}
    assert verdict(made) == [
        "Most of the mean TTFT is queueing before the first batch (75.0% in full): capacity is short.",
        "Most of the mean TTFT is queueing before the first batch (75.0% in late), but no batch left a request behind: "
        "they wait until the loop has time for them, not for capacity.",
    ]


def test_equal_runs_are_called_equal_and_one_run_is_just_described() -> None:
    alike = {"a": {"output_throughput": 100.0}, "b": {"output_throughput": 101.0}}
    assert verdict(alike) == ["Output throughput is the same in all runs to within 2.0%: 101 tok/s in b."]
    assert verdict({"a": {"output_throughput": 100.0}}) == ["a: output throughput 100 tok/s."]


def test_a_run_without_a_finished_request_still_has_a_verdict_and_a_table() -> None:
    found = {"a": summarise(record_of([request_row(request_id="x", arrival_s=0.0, status="unfinished")]))}
    assert verdict(found) == [
        "a finished 0 of 1 requests (1 unfinished); its latencies and throughput count the finished ones."
    ]
    assert any("Unfinished" in line for line in printed(found))


def test_a_compact_table_of_any_number_of_runs_fits_into_eighty_columns(summaries: dict[str, dict]) -> None:
    many = {f"{name} with a long name {turn}": found for turn in range(4) for name, found in summaries.items()}
    file = io.StringIO()
    Console(file=file, width=80).print(compact_table(many, list(many)[1]))
    lines = file.getvalue().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 80
    assert "…" not in file.getvalue() and lines[0].split()[:2] == ["out", "tok/s"]
    assert lines[-2].strip().startswith("* best of its column") or lines[-1].strip().startswith("* best of its column")


def test_numbers_of_very_different_size_each_get_their_own_unit() -> None:
    assert written([0.03909, 123.0], U.SECONDS) == ["39.09 ms", "123.0 s"]


def test_reasons_tell_hidden_cpu_time_from_bubbles_and_lost_memory() -> None:
    runs = {
        loop: toy_run(loop, number=60, pp=2 if loop == "pipeline" else 1) for loop in ("normal", "overlap", "pipeline")
    }
    lines = verdict(
        {name: summarise(run) for name, run in runs.items()}, {name: time_use(run) for name, run in runs.items()}
    )
    text = " ".join(lines)
    assert re.search(r"normal keeps the GPU waiting for the CPU \d+\.\d% of the time", text)
    assert re.search(r"overlap waits (<?\d+\.\d%), hiding \d+\.\d%", text)
    assert re.search(r"pipeline bubbles.* in pipeline\)", text)
