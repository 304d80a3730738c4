"""The pages of sweeps and plans: their numbers, that they are safe, and that a browser draws and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports.metrics.sweep_metrics import SWEEP_METRICS
from reports.page.sweep_page import main_effects, sweep_page_html
from tests.search.run import SAMPLE, sweep, workbench
from workbench.search.objectives import parse_objectives
from workbench.search.results import read_results
from workbench.search.sweep import pareto_front


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "o"
    sweep(folder, "--vary", "loop=normal,overlap", "--vary", "tp=1,2,3", "--vary", "chunk=256,none")
    return folder


def embedded(folder: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', (folder / "sweep.html").read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_every_number_of_the_page_is_that_of_the_csv(swept):
    results = pd.read_csv(swept / "results.csv").set_index("point")
    data = embedded(swept)
    assert {row["point"] for row in data["rows"]} == set(results.index[results.status == "finished"])
    for row in data["rows"]:
        for metric, value in zip(data["metrics"], row["m"], strict=True):
            expected = results[metric["name"]][row["point"]]
            assert (value is None and pd.isna(expected)) or value == pytest.approx(expected, rel=1e-8)


def test_the_page_needs_nothing_from_outside_and_shows_what_did_not_run(swept):
    text = (swept / "sweep.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "does not divide the 32 attention heads" in text


def test_names_cannot_break_out_of_the_page(swept):
    manifest, rows = read_results(swept)
    manifest["trace"]["name"] = "</script><script>alert(1)</script>"
    rows[0]["reason"] = "</script><b>"
    text = sweep_page_html(rows, manifest, lambda row: "</script><script>alert(2)")
    assert "<script>alert" not in text


def test_the_pareto_front_is_what_no_other_point_beats(swept):
    _, rows = read_results(swept)
    objectives = parse_objectives("output_throughput_per_gpu,ttft_p99_s")
    front = pareto_front(rows, objectives)
    finished = [row for row in rows if row["status"] == "finished"]
    for row in finished:
        beaten = any(
            other["output_throughput_per_gpu"] >= row["output_throughput_per_gpu"]
            and other["ttft_p99_s"] <= row["ttft_p99_s"]
            and (other["output_throughput_per_gpu"], other["ttft_p99_s"])
            != (row["output_throughput_per_gpu"], row["ttft_p99_s"])
            for other in finished
        )
        assert (row in front) != beaten


def test_effects_are_shares_of_the_variance():
    rows = [{"a": a, "b": b, "m": 10.0 * a + b} for a in (0, 1) for b in (0, 1, 2)]
    effects = dict(main_effects(rows, ["a", "b"], "m"))
    assert effects["a"] + effects["b"] == pytest.approx(1)
    assert effects["a"] > 0.95


def test_every_metric_of_a_run_is_a_column_with_a_name():
    from reports.metrics.summary import summarise
    from tests.reports.records import toy_run

    assert set(summarise(toy_run())) <= set(SWEEP_METRICS)


def opened(browser: Any, path: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    faults: list[str] = []
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else faults.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("h1")
    return page, faults


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
@pytest.mark.slow
def test_a_browser_draws_the_sweep_and_answers(browser, swept, width, scheme):
    page, faults = opened(browser, swept / "sweep.html", width, scheme)
    finished = len(embedded(swept)["rows"])
    assert page.locator("#pareto .dot").count() == finished
    assert (
        page.locator("#heat .cell").count() == 4
    )  # two of three tp, as the third did not run, times two loops or chunks
    assert page.locator("#parallel .wire").count() == finished
    assert page.locator("#runs tbody tr").count() == finished
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # sorting: by a metric, and back
    heading = page.locator('#runs th[data-column="ttft_p99_s"]')
    heading.locator("button").click()
    by_point = {row["point"]: row for row in embedded(swept)["rows"]}
    at = [metric["name"] for metric in embedded(swept)["metrics"]].index("ttft_p99_s")
    order = [int(p) for p in page.eval_on_selector_all("#runs tbody tr", "rows => rows.map(r => r.dataset.point)")]
    assert [by_point[p]["m"][at] for p in order] == sorted(by_point[p]["m"][at] for p in order)
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    # hovering explains, clicking picks everywhere
    dot = page.locator("#pareto .dot").first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    assert "point" in page.locator("#tip").inner_text()
    page.locator("#runs tbody tr").first.click()
    assert page.locator("#picked pre").inner_text().startswith("workbench simulate ")
    assert page.locator("#pareto .picked").count() == 1
    # choosing another metric draws the heat map anew
    before = page.locator("#heat svg").inner_html()
    page.select_option('[data-for="heat"] select >> nth=0', "ttft_p99_s")
    assert page.locator("#heat svg").inner_html() != before
    # brushing an axis filters the table
    grip = page.locator("#parallel .grip").first
    grip.scroll_into_view_if_needed()
    box = grip.bounding_box()
    page.mouse.move(box["x"] + 12, box["y"] + 4)
    page.mouse.down()
    page.mouse.move(box["x"] + 12, box["y"] + box["height"] * 0.3, steps=4)
    page.mouse.up()
    assert 0 < page.locator("#runs tbody tr").count() < finished
    page.get_by_role("button", name="free all axes").click()
    assert page.locator("#runs tbody tr").count() == finished
    assert faults == []


@pytest.mark.slow
def test_a_browser_draws_the_plan_and_sorts_it(browser, tmp_path):
    done = workbench(
        "plan",
        SAMPLE,
        "--requests",
        30,
        "--slo",
        "ttft_p90=300ms",
        "--vary",
        "max_running=2,4,64",
        "--out",
        tmp_path / "o",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "o" / "plan.json").read_text())
    for width, scheme in ((1200, "dark"), (400, "light")):
        page, faults = opened(browser, tmp_path / "o" / "plan.html", width, scheme)
        assert page.locator("#rates .bar").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#answer li").first.inner_text() == plan["answer"][0]
        page.locator("#configurations th button", has_text="highest rate").click()
        rates = page.eval_on_selector_all("#configurations tbody tr", "rows => rows.map(r => r.cells[2].dataset.value)")
        numbers = [float(rate) for rate in rates]
        assert numbers == sorted(numbers)
        assert faults == []


@pytest.mark.slow
def test_the_commands_of_the_document_run(tmp_path):
    root = SAMPLE.parent.parent.parent
    text = (root / "docs" / "sweep-and-plan.md").read_text()
    commands = [line.strip() for line in text.splitlines() if line.startswith("    workbench ")]
    assert len(commands) == 6
    for command in commands:
        words = [
            word.replace("traces/samples", str(SAMPLE.parent)).replace("docs/", f"{root}/docs/")
            for word in command.split()[1:]
        ]
        done = workbench(*words, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
