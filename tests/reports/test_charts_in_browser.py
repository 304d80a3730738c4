"""The charts of the page: every point against the CSV files, zooming, the keyboard, their axes."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.page.report_page import write_report
from reports.record.run_record import RunRecord
from tests.reports.records import iteration_row, record_of, request_row
from tests.reports.simulated import LOOPS


def test_every_point_of_the_charts_is_the_one_pandas_computes_from_the_csv_files(three_loops: Path, page: Any) -> None:
    drawn = page.evaluate(
        """async () => { const plain = async (packed) => Object.fromEntries(Object.entries(await WB.floats(packed))
                .map(([name, values]) => [name, Array.from(values, (value) => value ?? NaN)]));
            const { time, cdfs } = WB.data;
            return [await plain(time), Object.fromEntries(await Promise.all(
                Object.entries(cdfs).map(async ([name, packed]) => [name, await plain(packed)])))]; }"""
    )
    time = {name: np.array(values, float) for name, values in drawn[0].items()}
    tables = [
        (pd.read_csv(three_loops / loop / "requests.csv"), pd.read_csv(three_loops / loop / "iterations.csv"))
        for loop in LOOPS
    ]
    moments = [
        table[column]
        for requests, steps in tables
        for table, column in ((requests, "arrival_s"), (requests, "finish_s"), (steps, "end_s"))
    ]
    edges_s = np.linspace(pd.concat(moments).min(), pd.concat(moments).max(), len(time["t"]) + 1)
    assert np.allclose(time["t"], (edges_s[1:] + edges_s[:-1]) / 2, rtol=1e-5)
    for place, (requests, steps) in enumerate(tables):
        expected = series_by_pandas(requests, steps, edges_s)
        shown = {name.split(".")[1]: values for name, values in time.items() if name.startswith(f"{place}.")}
        idle = sum(values for name, values in shown.items() if name.startswith("idle_"))
        assert np.allclose(idle + shown["busy"], 1, atol=2e-5)
        assert set(expected) == {name for name in shown if not name.startswith("idle_")}
        for name, values in expected.items():
            assert np.allclose(shown[name], values, rtol=1e-5, atol=1e-6, equal_nan=True), (LOOPS[place], name)
    for name, chart in drawn[1].items():
        cdfs = {key: np.array(values, float) for key, values in chart.items()}
        for place, loop in enumerate(LOOPS):
            values, counts = latencies_by_pandas(three_loops / loop, name)
            # Points are rounded to six digits: a value may lie on either side of its own.
            low, high = (
                np.array([counts[values <= x * nudge].sum() for x in cdfs["x"]]) / counts.sum()
                for nudge in (1 - 1e-5, 1 + 1e-5)
            )
            assert np.all((low - 1e-5 <= cdfs[str(place)]) & (cdfs[str(place)] <= high + 1e-5)), (loop, name)


def series_by_pandas(requests: pd.DataFrame, steps: pd.DataFrame, edges_s: np.ndarray) -> dict[str, np.ndarray]:
    """What the charts over time show of a run of one instance, bucket by bucket."""
    width_s, buckets = np.diff(edges_s), np.arange(len(edges_s) - 1)
    first, last = steps[steps.stage == 0], steps[steps.stage == steps.stage.max()]

    def sums(table: pd.DataFrame, at: str, column: str) -> np.ndarray:
        bucket = (np.searchsorted(edges_s, table[at], side="right") - 1).clip(0, len(buckets) - 1)
        return table[column].groupby(bucket).sum().reindex(buckets, fill_value=0).to_numpy(float)

    def means(moments: pd.Series, values: pd.Series, gone_s: list[float]) -> np.ndarray:
        """Of a step function over each bucket."""
        steps = pd.concat((pd.Series(0, gone_s, float), pd.Series(values.to_numpy(float), moments)))
        steps = steps.sort_index(kind="stable")
        steps = steps[~steps.index.duplicated(keep="last")]
        cuts = np.union1d(steps.index, edges_s)
        held = steps.reindex(cuts).ffill().fillna(0).to_numpy()[:-1] * np.diff(cuts)
        bucket = np.searchsorted(edges_s, cuts[:-1], side="right") - 1
        inside = (bucket >= 0) & (bucket < len(buckets))
        area = pd.Series(held[inside]).groupby(bucket[inside]).sum().reindex(buckets, fill_value=0)
        return area.to_numpy() / width_s

    alive = requests[requests.finish_s.notna()].sort_values("arrival_s")
    latest = alive.finish_s.cummax()
    gone_s = latest[~(alive.arrival_s.shift(-1) <= latest)].tolist()
    series = {
        "running": means(first.start_s, first.running, gone_s),
        "waiting": means(first.start_s, first.waiting, gone_s),
        "kv": means(first.start_s, first.kv_used_tokens, []),
    }
    for name in ("decode", "prefill"):
        series[f"{name}_tokens"] = sums(last, "end_s", f"{name}_tokens") / width_s
    with np.errstate(invalid="ignore", divide="ignore"):
        launched = sums(first.assign(one=1), "start_s", "one")
        made = first.assign(tokens=first.prefill_tokens + first.decode_tokens)
        for name, column in (
            ("batch", "requests"),
            ("batch_tokens", "tokens"),
            ("batch_prefill", "prefill_tokens"),
            ("batch_decode", "decode_tokens"),
        ):
            series[name] = sums(made, "start_s", column) / launched
        scheduled = requests[requests.scheduled_s.notna()]
        series["hit_rate"] = sums(scheduled, "scheduled_s", "cached_tokens") / sums(
            scheduled, "scheduled_s", "input_tokens"
        )
    stages = steps.stage.max() + 1
    for mode in ("prefill", "decode", "mixed"):
        of_mode = steps[steps["mode"] == mode]
        inside_s = [(of_mode.end_s.clip(*ends) - of_mode.start_s.clip(*ends)).sum() for ends in pairwise(edges_s)]
        series[mode] = np.array(inside_s) / width_s / stages
    series["busy"] = series["prefill"] + series["decode"] + series["mixed"]
    return series


def latencies_by_pandas(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, how often) of all finished requests, or of the gaps between tokens."""
    if name == "itl":
        gaps = pd.read_csv(folder / "itl.csv")
        return gaps.itl_s.to_numpy(), gaps["count"].to_numpy()
    table = pd.read_csv(folder / "requests.csv")
    table = table[table.status == "finished"]
    seconds = {
        "ttft": table.first_token_s - table.arrival_s,
        "e2e": table.finish_s - table.arrival_s,
        "tpot": (table.finish_s - table.first_token_s) / (table.output_tokens - 1).where(table.output_tokens > 1),
    }[name].dropna()
    return seconds.to_numpy(), np.ones(len(seconds))


def test_charts_over_time_zoom_together_and_take_the_timeline_with_them(page: Any) -> None:
    ranges = "() => workbenchCharts.slice(4).map(({chart}) => [chart.scales.x.min, chart.scales.x.max])"
    whole = page.evaluate(ranges)
    first = page.locator("#times .u-over").first
    first.scroll_into_view_if_needed()
    box = first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(60)
    zoomed = page.evaluate(ranges)
    assert zoomed[0][1] - zoomed[0][0] == pytest.approx((whole[0][1] - whole[0][0]) / 4, rel=0.05)
    assert all(bounds == zoomed[0] for bounds in zoomed)
    view = page.evaluate("() => [WB.timeline.view.begins[0], WB.timeline.view.span]")
    assert view == pytest.approx([zoomed[0][0], zoomed[0][1] - zoomed[0][0]])
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, y)
    assert page.evaluate(ranges) == whole
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    assert all(re.search(r"\d", legend) for legend in page.locator("#times .u-legend").all_inner_texts())


def test_charts_answer_the_keyboard(page: Any) -> None:
    width = "() => workbenchCharts[5].chart.scales.x.max - workbenchCharts[5].chart.scales.x.min"
    before = page.evaluate(width)
    page.locator("#times .chart > div").nth(1).focus()
    page.keyboard.press("+")
    page.wait_for_timeout(40)
    assert page.evaluate(width) == pytest.approx(before / 2, rel=0.02)
    page.keyboard.press("0")
    page.wait_for_timeout(40)
    assert page.evaluate(width) == before


@pytest.mark.parametrize("shortest_s", [0.0095, 0.0962, 0.0999, 0.1, 0.5])
@pytest.mark.slow
def test_a_logarithmic_axis_has_a_few_ticks_wherever_it_begins_and_ends(
    tmp_path: Path, open_page: Any, shortest_s: float
) -> None:
    # uPlot's own ticks never end where the axis begins between 9.5 and 10 times a power of ten.
    rows = [
        request_row(
            request_id=f"r{i}",
            arrival_s=0.0,
            queued_s=0.0,
            scheduled_s=0.0,
            first_token_s=shortest_s / 2,
            finish_s=shortest_s * 1.5**i,
            input_tokens=10,
            output_tokens=2,
        )
        for i in range(14)
    ]
    path = tmp_path / "report.html"
    write_report({"one": record_of(rows)}, path, "by hand", "")
    page = open_page(path)
    chart = "workbenchCharts.find((entry) => entry.body.getAttribute('aria-label').startsWith('E2E')).chart"
    low, high, scale = page.evaluate(
        f"(() => {{ const {{min, max, distr}} = {chart}.scales.x; return [min, max, distr]; }})()"
    )
    assert (low, scale) == (pytest.approx(shortest_s), 3)
    for part in (1.0, 0.3, 0.01):
        end = low * (high / low) ** part
        page.evaluate(f"{chart}.setScale('x', {{min: {low}, max: {end}}})")
        page.wait_for_timeout(50)
        ticks = page.evaluate(f"{chart}.axes[0]._splits")
        assert 2 <= len(ticks) <= 20 and all(low <= tick <= end * 1.0001 for tick in ticks)


def steps_until(end_s: float) -> RunRecord:
    """One request that waits for a second, then runs in steps of a tenth of one until the end."""
    steps = round((end_s - 1) * 10)
    rows = [
        iteration_row(
            iteration=i,
            mode=1 if i else 0,
            start_s=1 + i / 10,
            end_s=1.1 + i / 10,
            running=1,
            requests=1,
            kv_used_tokens=2 + i,
            decode_tokens=1,
            schedule_s=0.001,
        )
        for i in range(steps)
    ]
    request = request_row(
        request_id="a",
        arrival_s=0.0,
        queued_s=0.0,
        scheduled_s=1.0,
        first_token_s=1.1,
        finish_s=end_s,
        output_tokens=steps,
    )
    return record_of([request], rows)


def test_lines_end_where_their_run_does_and_what_is_counted_has_whole_ticks(tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "report.html"
    ends_s = {"short": 5.0, "long": 9.0}
    write_report({name: steps_until(end_s) for name, end_s in ends_s.items()}, path, "by hand", "")
    page = open_page(path)
    charts = page.evaluate(
        """workbenchCharts.map(({body, chart}) => ({ label: body.getAttribute("aria-label"),
             columns: chart.data.map((column) => Array.from(column)), ticks: chart.axes[1]._splits }))"""
    )
    over_time = [chart for chart in charts if len(chart["columns"][0]) == 100]
    assert len(over_time) == 7 + 2 * 2, "all but the cache's hits, which nobody had"
    for chart in over_time:
        at_s, *lines = chart["columns"]
        title = chart["label"].split(",")[0]
        # A chart of one run has its layers, all of that run.
        runs = [title] * len(lines) if title in ends_s else list(ends_s)
        for run, line in zip(runs, lines, strict=True):
            known = [at for at, value in zip(at_s, line, strict=True) if value is not None]
            assert known and max(known) < ends_s[run], chart["label"]
            if title in ("Running", "KV in use", "GPU busy"):
                assert max(known) > ends_s[run] - 0.2
                assert min(v for at, v in zip(at_s, line, strict=True) if v is not None and at > 1.1) > 0
        if chart["label"].split(", ")[1] in ("requests", "tokens", "requests a batch", "tokens a batch"):
            assert len(chart["ticks"]) > 1 and all(tick == int(tick) for tick in chart["ticks"]), chart["label"]


def test_keys_name_what_there_is_to_see_and_a_moment_is_as_exact_as_its_stretch(tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "report.html"
    write_report({"one": steps_until(9.0)}, path, "by hand", "")
    page = open_page(path)
    keys = page.eval_on_selector_all("ul.key", "all => all.map(key => [...key.children].map(item => item.textContent))")
    use, timeline, requests = keys
    assert [name for name in use if not name.startswith("idle")] == ["prefill", "decode"]
    assert "GPU mixed" not in timeline and [name for name in timeline if name.startswith("CPU")] == ["CPU schedule"]
    assert "out of KV" not in timeline and not any("pipeline bubble" in name for name in use)
    assert "retracted" not in requests
    caption = "text => WB.timeline.runs[0].caption.textContent === text"
    page.evaluate("WB.timeline.range(2.123456789, 2.223456789)")
    page.wait_for_function(caption, arg="2.123 s  +  100 ms")
    page.evaluate("WB.timeline.moves.whole()")
    page.wait_for_function(caption, arg="0.00 s  +  9 s")
