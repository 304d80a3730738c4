"""The page as a reader meets it: drawn, hovered, zoomed, sorted, searched, in the dark and on a phone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.metrics.host_lane import host_lane
from reports.page.report_page import MOST_BYTES, write_report
from reports.record.run_record import RunRecord, read_record
from tests.reports.records import record_of, toy_run
from tests.reports.simulated import LOOPS, SAMPLE, SHARED, simulate
from tests.reports.test_metrics import by_pandas
from tests.reports.test_spans import two_requests

COLOURS = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
    const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(image.data.buffer)).size;
})"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_everything_is_drawn_in_any_scheme_and_width(
    three_loops: Path, open_page: Any, width: int, scheme: str
) -> None:
    page = open_page(three_loops / "report.html", width, scheme)
    colours = page.evaluate(COLOURS)
    assert len(colours) == 3 + 4 + 8 + 2 * 3 and min(colours) > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#waterfall li").count() == 14
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")


def test_every_number_of_the_table_is_the_one_pandas_computes_from_the_csv_files(three_loops: Path, page: Any) -> None:
    shown = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("tr[data-metric]")].map((row) => [row.dataset.metric,
            [...row.querySelectorAll("td")].map((cell) => cell.dataset.value)]))"""
    )
    for place, loop in enumerate(LOOPS):
        expected = by_pandas(three_loops / loop, slo_ttft_s=0.5, slo_tpot_s=np.inf)
        for name, (wanted, tolerance) in expected.items():
            if name not in shown:
                assert not wanted, name  # rows that would say nothing are left out
            elif wanted is None:
                assert shown[name][place] == "", name
            else:
                assert float(shown[name][place]) == pytest.approx(wanted, rel=1e-9, abs=max(tolerance, 1e-12)), name


def test_the_bars_of_time_add_up_and_are_those_of_the_csv_files(three_loops: Path, page: Any) -> None:
    for loop in LOOPS:
        requests, steps = (
            pd.read_csv(three_loops / loop / "requests.csv"),
            pd.read_csv(three_loops / loop / "iterations.csv"),
        )
        bars = page.evaluate(
            """(run) => [...document.querySelectorAll(`.use[data-run="${run}"] .stack i`)].map((bar) =>
                [bar.dataset.kind, Number(bar.dataset.seconds)])""",
            loop,
        )
        seconds = dict(bars)
        stages = steps.stage.max() + 1
        span_s = (requests.finish_s.max() - requests.arrival_s.min()) * stages
        assert sum(seconds.values()) == pytest.approx(span_s, rel=1e-9)
        last_s = requests.finish_s.max()  # the overlap loop may still compute a slot that nobody wants
        for mode, of_mode in steps.groupby("mode"):
            inside_s = of_mode.end_s.clip(upper=last_s) - of_mode.start_s.clip(upper=last_s)
            assert seconds[mode] == pytest.approx(inside_s.sum(), abs=0.02)
        assert sum(seconds.get(mode, 0) for mode in ("prefill", "decode", "mixed")) == pytest.approx(
            (steps.end_s.clip(upper=last_s) - steps.start_s.clip(upper=last_s)).sum(), abs=1e-6
        )


def test_the_timeline_in_the_page_is_the_record_to_the_nanosecond(page: Any, records: dict[str, RunRecord]) -> None:
    for place, (name, record) in enumerate(records.items()):
        column = record.iterations
        made = page.evaluate(
            """(place) => { const { made } = WB.timeline.runs[place];
                const list = (values) => Array.from(values);
                return Object.fromEntries([...["iteration", "mode", "requests", "prefill_tokens", "decode_tokens",
                    "context_tokens", "kv_used_tokens", "waiting", "running", "receive", "schedule", "launch", "process",
                    "processed"].map((name) => [name, list(made[name])]),
                    ...made.start.map((_, stage) => [`start${stage}`, list(made.start[stage])]),
                    ...made.end.map((_, stage) => [`end${stage}`, list(made.end[stage])])]); }""",
            place,
        )
        first = np.flatnonzero(column["stage"] == 0)
        first = first[np.argsort(column["launch_s"][first], kind="stable")]
        for field in (
            "iteration",
            "mode",
            "requests",
            "prefill_tokens",
            "decode_tokens",
            "context_tokens",
            "kv_used_tokens",
            "waiting",
            "running",
        ):
            assert made[field] == column[field][first].tolist(), (name, field)
        phases = {"receive": "receive_s", "schedule": "schedule_s", "launch": "launch_host_s", "process": "process_s"}
        for field, source in phases.items():
            assert np.allclose(made[field], column[source][first], atol=1e-10)
        for stage in range(column["stage"].max() + 1):
            rows = np.flatnonzero(column["stage"] == stage)
            rows = rows[np.argsort(column["iteration"][rows], kind="stable")]
            assert np.allclose(made[f"start{stage}"], column["start_s"][rows], atol=1e-9)
            assert np.allclose(made[f"end{stage}"], column["end_s"][rows], atol=1e-9)
        lane = host_lane(column, 0)
        drawn = page.evaluate(
            """(place) => { const { bars } = WB.timeline.runs[place].lanes[0];
                return [Array.from(bars.begin.slice(0, bars.length)), Array.from(bars.end.slice(0, bars.length)),
                    Array.from(bars.kind.slice(0, bars.length))]; }""",
            place,
        )
        assert len(drawn[0]) == len(lane.kind)
        assert np.allclose(drawn[0], lane.begin_s, atol=2e-9) and np.allclose(drawn[1], lane.end_s, atol=2e-9)
        assert drawn[2] == lane.kind.tolist()


def test_no_lane_of_the_page_does_two_things_at_once(page: Any) -> None:
    for place in range(3):
        lanes = page.evaluate(
            """(place) => WB.timeline.runs[place].lanes.map(({ bars }) =>
                Array.from({ length: bars.length }, (_, i) => [bars.begin[i], bars.end[i]]))""",
            place,
        )
        for bars in lanes:
            assert all(later[0] >= earlier[1] - 2e-9 for earlier, later in pairwise(bars))


def test_the_timeline_zooms_from_the_whole_run_to_microseconds_and_back(page: Any) -> None:
    span = "() => WB.timeline.view.span"
    page.click("[data-move=whole]")
    whole = page.evaluate(span)
    assert whole > 5
    canvas = page.locator("#lanes canvas").first
    canvas.focus()
    for _ in range(40):
        page.keyboard.press("+")
    assert page.evaluate(span) <= 3e-6
    page.keyboard.press("0")
    assert page.evaluate(span) == whole
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(50)
    assert page.evaluate(span) < whole
    page.keyboard.press("b")
    before = page.evaluate("() => WB.timeline.view.begins")
    page.mouse.move(box["x"] + 600, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 40, steps=3)
    page.mouse.up()
    after = page.evaluate("() => WB.timeline.view.begins")
    moved = [late - early for early, late in zip(before, after, strict=True)]
    assert moved[0] > 0 and moved == pytest.approx([moved[0]] * 3)


def test_hovering_the_timeline_names_the_batch(page: Any, records: dict[str, RunRecord]) -> None:
    canvas = page.locator("#lanes canvas").nth(1)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    found = set()
    for x in range(80, 1200, 40):
        page.mouse.move(box["x"] + x, box["y"] + 18 + 18 + 3 + 12)
        if page.locator("#tip").is_visible():
            found.add(page.locator("#tip").inner_text())
    told = [text for text in found if re.search(r"batch \d+, \w+: \d+ requests", text)]
    assert len(told) > 3
    number, mode, requests = re.search(r"batch (\d+), (\w+): (\d+) requests", told[0]).groups()
    column = records["overlap"].iterations
    row = np.flatnonzero(column["iteration"] == int(number))[0]
    assert int(requests) == column["requests"][row]
    assert ("prefill", "decode", "mixed")[column["mode"][row]] == mode


def test_the_keyboard_steps_from_batch_to_batch_and_says_so(page: Any) -> None:
    page.locator("#lanes canvas").first.focus()
    numbers = []
    for key in ("n", "n", "n", "p"):
        page.keyboard.press(key)
        numbers.append(int(re.search(r"batch (\d+)", page.locator("#batch").inner_text())[1]))
    assert numbers[1] == numbers[0] + 1 and numbers[2] == numbers[0] + 2 and numbers[3] == numbers[1]


def test_a_metric_sorts_the_runs_and_a_run_sorts_the_metrics(page: Any) -> None:
    row = page.locator('tr[data-metric="ttft_mean_s"]')

    def names() -> list[str]:
        return page.locator("table.metrics thead th button").all_inner_texts()

    def values() -> list[float]:
        return [
            float(text) for text in row.locator("td").evaluate_all("(cells) => cells.map((cell) => cell.dataset.value)")
        ]

    given = names()
    row.locator("th button").click()
    assert values() == sorted(values())
    row.locator("th button").click()
    assert values() == sorted(values(), reverse=True)
    row.locator("th button").click()
    assert names() == given
    page.locator('thead th[data-run="1"] button').click()
    changes = page.evaluate(
        """() => [...document.querySelectorAll("tr[data-metric]")].map((row) => {
            const [base, value] = [0, 1].map((run) => row.querySelector(`td[data-run="${run}"]`).dataset.value);
            return base === "" || value === "" || Number(base) === 0 ? -1 : Math.abs(value / base - 1); })"""
    )
    assert changes == sorted(changes, reverse=True) and changes[0] > 0


def test_another_baseline_changes_every_difference(page: Any) -> None:
    page.select_option("#baseline", "2")
    row = page.locator('tr[data-metric="e2e_mean_s"] td')
    values = [float(value) for value in row.evaluate_all("(cells) => cells.map((cell) => cell.dataset.value)")]
    shown = row.locator("small").all_inner_texts()
    expected = [f"{(value / values[2] - 1) * 100:+.1f}%" for value in values[:2]]
    assert shown == [*expected, ""]
    assert page.locator(".base-name").inner_text() == "pipeline"


def test_the_slowest_requests_are_those_of_the_csv_file_and_a_chosen_one_is_shown_in_every_run(
    three_loops: Path, page: Any
) -> None:
    requests = pd.read_csv(three_loops / "normal/requests.csv", dtype={"request_id": str})
    requests["e2e"] = requests.finish_s - requests.arrival_s
    requests["ttft"] = requests.first_token_s - requests.arrival_s
    shown = page.evaluate(
        """() => [...document.querySelectorAll("#waterfall li")].map(({ dataset }) =>
            [dataset.request, Number(dataset.e2e), Number(dataset.ttft)])"""
    )
    slowest = requests.nlargest(14, "e2e")
    assert [each[0] for each in shown] == slowest.request_id.tolist()
    assert [each[1] for each in shown] == pytest.approx(slowest.e2e.tolist(), abs=1e-9)
    assert [each[2] for each in shown] == pytest.approx(slowest.ttft.tolist(), abs=1e-9)
    retracted = requests[requests.retractions > 0].request_id.iloc[0]
    page.fill("#request", retracted)
    assert page.locator("#waterfall li").count() == 3
    assert page.locator("#waterfall li").first.locator(".part.retracted").count() > 0
    assert page.locator("#waterfall li").first.locator(".part.prefill").count() > 1
    page.locator("#waterfall button").first.click()
    row = requests[requests.request_id == retracted].iloc[0]
    assert page.evaluate("() => WB.timeline.view.begins[0]") == pytest.approx(row.arrival_s, abs=1e-6)
    page.fill("#request", "nobody")
    assert "no request “nobody”" in page.locator("#request-said").inner_text()


def test_colours_follow_the_scheme_when_it_changes(page: Any) -> None:
    stroke = "() => workbenchCharts[0].chart.series[1].stroke()"
    light = page.evaluate(stroke)
    page.emulate_media(color_scheme="dark")
    for _ in range(100):
        if page.evaluate(stroke) != light:
            return
        page.wait_for_timeout(50)
    raise AssertionError("the charts kept the colours of the light scheme")


@pytest.mark.slow
def test_a_long_run_keeps_detail_for_some_moments_and_shares_for_all(tmp_path: Path, open_page: Any) -> None:
    record = noisy_run(200_000)
    path = tmp_path / "r.html"
    write_report({"long": record}, path, "long", "c")
    assert path.stat().st_size < MOST_BYTES
    page = open_page(path)
    rows, everything = page.evaluate("() => [WB.timeline.runs[0].made.rows, WB.timeline.runs[0].made.of]")
    assert everything == 200_000 and 5_000 < rows < everything
    page.click("[data-move=whole]")
    page.wait_for_timeout(100)
    assert page.evaluate(COLOURS)[0] > 10
    page.locator("#lanes canvas").first.scroll_into_view_if_needed()
    box = page.locator("#lanes canvas").first.bounding_box()
    page.mouse.move(box["x"] + 500, box["y"] + 50)
    assert "decode" in page.locator("#tip").inner_text()
    # The whole strip is what the record says, bin by bin.
    lane = page.evaluate(
        "() => { const run = WB.timeline.runs[0]; return run.strip.columns.map((kinds) => Array.from(kinds)); }"
    )
    decode = sum(kinds[1] for kinds in lane) / len(lane)
    column = record.iterations
    decoding = column["mode"] == 1
    whole = column["end_s"].max() - record.requests["arrival_s"].min()
    assert decode == pytest.approx((column["end_s"] - column["start_s"])[decoding].sum() / whole, abs=0.01)


def noisy_run(iterations: int) -> RunRecord:
    """A long run with times as uneven as measured ones."""
    random = np.random.default_rng(0)
    prefill = random.random(iterations) < 0.05
    running = np.clip(100 + np.cumsum(random.integers(-1, 2, iterations)), 1, 256)
    lasts = np.where(prefill, 0.04, 0.008) * (1 + np.abs(random.normal(0, 0.1, iterations)))
    phases = {
        name: 1e-4 * (1 + random.random(iterations))
        for name in ("receive_s", "schedule_s", "launch_host_s", "process_s")
    }
    end = np.cumsum(lasts + 1e-4) + 0.01
    zero = np.zeros(iterations, dtype=np.int64)
    columns = {
        "iteration": np.arange(iterations),
        "instance": zero,
        "stage": zero,
        "mode": np.where(prefill, 0, 1).astype(np.int8),
        "launch_s": np.concatenate(([0.009], end[:-1] - 0.001)),
        "start_s": end - lasts,
        "end_s": end,
        "requests": np.where(prefill, 2, running),
        "prefill_tokens": np.where(prefill, random.integers(9, 4000, iterations), 0),
        "decode_tokens": np.where(prefill, 0, running),
        "context_tokens": random.integers(1000, 200_000, iterations),
        "kv_used_tokens": random.integers(1000, 200_000, iterations),
        "waiting": random.integers(0, 5, iterations),
        "running": running,
        **phases,
    }
    few = toy_run(number=50)
    few.requests["finish_s"][-1] = end[-1]
    return RunRecord({**few.meta, "name": "long"}, few.requests, columns, few.itl)


@pytest.mark.slow
def test_a_run_without_iterations_makes_a_page_without_a_timeline_that_says_so(tmp_path: Path, open_page: Any) -> None:
    few = toy_run(number=20)
    theirs = RunRecord({**few.meta, "name": "theirs"}, few.requests, record_of([]).iterations, few.itl)
    write_report({"theirs": theirs}, tmp_path / "alone.html", "t", "c")
    page = open_page(tmp_path / "alone.html")
    assert page.locator("#timeline").count() == 0
    assert "theirs has no iterations" in page.locator(".caveats").inner_text()
    assert page.locator("#waterfall li").count() == 14
    write_report({"ours": few, "theirs": theirs}, tmp_path / "both.html", "t", "c")
    both = open_page(tmp_path / "both.html")
    assert both.locator("#lanes canvas").count() == 1


@pytest.mark.skipif(SHARED is None, reason="the reference data (../shared/data) is not here")
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED.glob("*.gz")) if SHARED else [])
@pytest.mark.slow
def test_pages_of_slices_of_real_traces_are_drawn(tmp_path: Path, open_page: Any, name: str) -> None:
    assert SHARED is not None
    # Token ids of a model's own tokenizer need its vocabulary.
    model = ("--model", "Qwen/Qwen3-8B") if "qwen3" in name else ()
    out = simulate(tmp_path / "o", SHARED / name, "--loop", "normal,overlap", "--requests", 40, *model)
    page = open_page(out / "report.html")
    assert min(page.evaluate(COLOURS)) > 3
    assert page.locator("#waterfall li").count() == 14


@pytest.mark.parametrize("apart_s", [1e-6, 40 * 86400.0, 3.9e9])
def test_a_run_of_any_span_is_drawn(tmp_path: Path, open_page: Any, apart_s: float) -> None:
    takes_s = min(0.5, apart_s / 2)
    write_report({"long": two_requests(0.0, apart_s, takes_s)}, tmp_path / "page.html", "title", "")
    page = open_page(tmp_path / "page.html")
    rows = page.evaluate("() => [...document.querySelectorAll('#waterfall li')].map((row) => row.dataset.e2e)")
    assert [float(row) for row in rows] == pytest.approx([takes_s] * 2, abs=2e-6)
    assert page.evaluate("() => WB.timeline.view.span") == pytest.approx(apart_s + takes_s, rel=1e-9)
    assert "NaN" not in page.locator("body").inner_text()


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pools that prefill and decode, one of which is lost for a while."""
    pools = ("--pool", "prefill:2", "--pool", "decode:1", "--kv-link", "2GB/s")
    return simulate(
        tmp_path_factory.mktemp("sides") / "o", SAMPLE, "--requests", 60, *pools, "--fail", "prefill.1:at=4s,for=2s"
    )


@pytest.mark.parametrize("width", [1200, 400])
def test_both_sides_lie_on_one_timeline_with_kv_on_its_way_between_them(
    two_sides: Path, open_page: Any, width: int
) -> None:
    page = open_page(two_sides / "report.html", width)
    record = read_record(two_sides / "overlap")
    lanes = page.evaluate("() => WB.timeline.runs[0].lanes.map(({ label }) => label)")
    assert lanes == ["prefill 0", "prefill 1", "KV", "decode 0"]
    found = page.evaluate(
        """() => { const kv = WB.timeline.runs[0].transfers;
            return kv.ids.map((id, i) => [id, kv.begin[i], kv.begin[i] + kv.lasts[i], kv.source[i], kv.target[i]]); }"""
    )
    column = record.requests
    rows = zip(
        *(column["request_id"], column["transfer_start_s"], column["transfer_end_s"]),
        *(column["prefill_instance"], column["decode_instance"]),
        strict=True,
    )
    expected = sorted(rows, key=lambda row: row[1])
    assert [row[0] for row in found] == [row[0] for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[1:] == pytest.approx([float(value) for value in theirs[1:]], abs=2e-7)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#ttft .stack").count() == 2 and page.locator("#instances .fleet").count() == 2
    headings = page.locator(".pools thead th").all_inner_texts()
    assert headings[-1] == "kWh", "what nobody priced has no column"
    table = page.evaluate(
        "() => { const table = document.querySelector('.pools'); return [table.scrollWidth, table.parentNode.clientWidth] }"
    )
    assert width < 1200 or table[0] <= table[1], "all columns are in sight"
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.stack span')].filter((span) =>
            span.offsetWidth && span.offsetWidth > span.parentNode.clientWidth).map((span) => span.textContent)"""
    )
    assert cut == [], "no share is cut off"
    assert page.locator(".use.of-pool").count() == 2


def test_an_instance_of_a_side_can_be_looked_at_alone_and_a_transfer_tells_what_it_is(
    two_sides: Path, open_page: Any
) -> None:
    page = open_page(two_sides / "report.html", 1200)
    select = page.locator("#lanes select")
    assert select.locator("option").all_inner_texts() == ["both sides", "prefill 0", "prefill 1", "decode 0"]
    select.select_option("2")
    page.wait_for_function("() => WB.timeline.runs[0].lanes.length === 2")
    select.select_option("-1")
    page.wait_for_function("() => WB.timeline.runs[0].lanes.length === 4")
    begin, end, row = page.evaluate(
        """() => { const kv = WB.timeline.runs[0].transfers; const at = kv.lasts.indexOf(Math.max(...kv.lasts));
            WB.timeline.range(kv.begin[at], kv.begin[at] + kv.lasts[at]);
            return [kv.begin[at], kv.lasts[at], kv.row[at]]; }"""
    )
    assert end > 0 and begin >= 0
    canvas = page.locator("#lanes canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.wait_for_timeout(100)
    top = page.evaluate("() => WB.timeline.runs[0].transfers.top")
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + top + 3 + 5 * row)
    page.wait_for_selector("#tip:not([hidden])")
    text = page.inner_text("#tip")
    assert "KV of " in text and "→ decode 0" in text and "prompt of" in text
