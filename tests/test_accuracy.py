"""How sure a prediction is: bands from errors of like rows, what a record, a table and a plan say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.board.accuracy import groups_of, keep_errors
from benchmarks.board.predict import Predicted
from benchmarks.board.silicon import Row
from reports.metrics.how_sure import Band, accuracy_lines, accuracy_numbers, difference_lines, range_rows, ranges
from reports.metrics.seeds import seed_lines
from reports.metrics.summary import summarise
from reports.record.run_record import RunRecord, read_record, write_record
from tests.search.run import SAMPLE
from workbench.cli.app import app
from workbench.settings import accuracy
from workbench.settings.accuracy import Case, accuracy_of, engine_of, layout_text
from workbench.settings.engines import engine_names, short_names
from workbench.settings.run_settings import RunSettings

CASE = Case("vllm", "hopper", "dense", "tp 1", "roofline")
VLLM = RunSettings(engine="vllm")
ERRORS = [-0.20 + 0.02 * number for number in range(21)]
"""Of which 10 % are below -0.16 and 10 % above 0.16."""


def group(rows: list[list[Any]], **of: str) -> dict[str, Any]:
    values = {"engine": "vllm", "family": "hopper", "model": "dense", "layout": "tp 1", "cost": "roofline"}
    return {**values, **of, "rows": rows}


def rows(errors: list[float] = ERRORS) -> list[list[Any]]:
    """Each of a load of its own; TTFT twice and E2E half as far off as TPOT."""
    return [[load, 2 * error, error, error / 2] for load, error in enumerate(errors)]


def table(*groups: dict[str, Any]) -> dict[str, Any]:
    return {"every": {"roofline": 1}, "groups": list(groups)}


def test_a_band_is_the_10th_to_90th_percentile_of_the_signed_errors_of_like_rows():
    found = accuracy_of(CASE, VLLM, "overlap", table(group(rows())))
    assert found["bands"] == {
        "ttft": {"low": -0.32, "high": 0.32, "rows": 21, "group": "vllm on hopper, dense, tp 1, cost roofline"},
        "tpot": {"low": -0.16, "high": 0.16, "rows": 21, "group": "vllm on hopper, dense, tp 1, cost roofline"},
        "e2e": {"low": -0.08, "high": 0.08, "rows": 21, "group": "vllm on hopper, dense, tp 1, cost roofline"},
        # Requests that take 8 % longer are 1/1.08 as many a second.
        "throughput": {
            "low": round(1 / 1.08 - 1, 4),
            "high": round(1 / 0.92 - 1, 4),
            "rows": 21,
            "group": "vllm on hopper, dense, tp 1, cost roofline",
        },
    }
    assert found["case"] == {
        "engine": "vllm",
        "family": "hopper",
        "model": "dense",
        "layout": "tp 1",
        "cost": "roofline",
    }
    assert "why" not in found


@pytest.mark.parametrize(
    ("other", "common"),
    [
        ({"layout": "tp 8"}, "vllm on hopper, dense, cost roofline"),
        ({"layout": "tp 8", "model": "experts"}, "vllm on hopper, cost roofline"),
        ({"layout": "tp 8", "model": "experts", "family": "blackwell"}, "vllm, cost roofline"),
    ],
)
def test_a_group_of_fewer_than_twenty_rows_gives_way_to_the_next_coarser_one(other, common):
    few = group(rows([0.5] * 19))
    found = accuracy_of(CASE, VLLM, "overlap", table(few, group(rows([0.1] * 21), **other)))
    assert found["bands"]["tpot"] == {"low": 0.1, "high": 0.5, "rows": 40, "group": common}
    assert accuracy_of(CASE, VLLM, "overlap", table(group(rows([0.5] * 20))))["bands"]["tpot"]["rows"] == 20


def test_each_measure_has_the_nearest_group_that_has_twenty_rows_of_it():
    own = group([[load, None, 0.1, 0.1] for load in range(30)])
    found = accuracy_of(CASE, VLLM, "overlap", table(own, group(rows([0.3] * 20), layout="tp 8")))
    assert found["bands"]["tpot"]["group"] == "vllm on hopper, dense, tp 1, cost roofline"
    assert found["bands"]["ttft"] == {
        "low": 0.6,
        "high": 0.6,
        "rows": 20,
        "group": "vllm on hopper, dense, cost roofline",
    }


@pytest.mark.parametrize("other", [{"engine": "sglang"}, {"cost": "measured"}])
def test_neither_another_engine_nor_another_cost_model_says_anything(other):
    found = accuracy_of(CASE, VLLM, "overlap", table(group(rows(), **other)))
    assert found["bands"] == found["differences"] == {}
    assert found["why"] == "not compared with anything measured: vllm, cost roofline"


def test_too_few_rows_are_no_band_and_are_counted():
    found = accuracy_of(CASE, VLLM, "overlap", table(group(rows([0.1] * 12)), group(rows([0.1] * 5), layout="tp 2")))
    assert found["bands"] == {}
    assert found["why"] == "compared with 17 measured rows alone, of vllm, cost roofline: too few to say how sure"


def test_instances_that_prefill_or_decode_alone_were_not_compared():
    found = accuracy_of(CASE, replace(VLLM, role="prefill"), "overlap", table(group(rows())))
    assert found["why"] == "not compared with anything measured: instances that prefill alone"


def test_the_band_of_a_difference_is_that_of_neighbouring_loads_and_what_they_have_in_common_cancels():
    # All are a third too short; of two neighbours one is 5 % more so than the other.
    pair = [[None, -1 / 3, -1 / 3], [None, -0.7 / 1.05 + 0.0, -1 / 3]]
    assert pair[1][1] == pytest.approx(-2 / 3)
    of = [[load, None, low, -1 / 3] for load in range(20) for low in (1 / 1.5 - 1, 1.05 / 1.5 - 1)]
    found = accuracy_of(CASE, VLLM, "overlap", table(group(of)))
    assert found["bands"]["e2e"]["low"] == found["bands"]["e2e"]["high"] == pytest.approx(-1 / 3, abs=1e-4)
    assert found["differences"]["e2e"]["low"] == found["differences"]["e2e"]["high"] == 0
    assert found["differences"]["tpot"] == {
        "low": round(1 / 1.05 - 1, 4),
        "high": 0.05,
        "rows": 20,
        "group": "vllm on hopper, dense, tp 1, cost roofline",
    }
    # Rows of loads of their own have no neighbours.
    assert accuracy_of(CASE, VLLM, "overlap", table(group(rows())))["differences"] == {}


def test_a_run_says_in_what_it_is_another_than_what_was_compared():
    said = RunSettings(engine="sglang", policy="lpm", evict="lfu")
    assert (
        "evict"
        in accuracy_of(replace(CASE, engine="sglang"), said, "normal", table(group(rows(), engine="sglang")))["unlike"]
    )
    plain = accuracy_of(CASE, RunSettings(engine="vllm", front_end="vllm"), "normal", table(group(rows())))
    assert "loop normal" in plain["unlike"] and "front_end none" not in plain["unlike"]
    assert "front_end none" in accuracy_of(CASE, VLLM, "overlap", table(group(rows())))["unlike"]


def test_every_preset_is_of_an_engine_with_a_short_name():
    assert {engine_of(name) for name in engine_names()} <= {"workbench", *short_names()}
    assert layout_text(8) == "tp 8"
    assert layout_text(1, dp=4, ep=4) == "tp 1 dp 4 ep 4"
    assert layout_text(2, pp=4) == "tp 2 pp 4"


def test_a_real_value_is_what_was_predicted_over_one_and_the_error():
    # Predicted 10 ms. Where predictions are half too short, it is 20 ms; where they are a quarter too long, 8 ms.
    assert Band(-0.5, 0.25, 20, "").real(10e-3) == pytest.approx((8e-3, 20e-3))


@pytest.fixture
def errors_of_sglang(monkeypatch):
    pairs = [[load, -0.5, error, -0.2] for load in range(20) for error in (-0.2, -0.2 * 1.01)]
    monkeypatch.setattr(accuracy, "read_recorded", lambda: table(group(pairs, engine="sglang")))


@pytest.fixture
def runs(errors_of_sglang, tmp_path):
    """The command's record of two loops, and what it printed."""
    done = CliRunner().invoke(
        app,
        f"simulate {SAMPLE} --requests 20 --concurrency 4 --engine sglang --loop normal,overlap --out {tmp_path / 'out'}",
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    return {name: read_record(tmp_path / "out" / name) for name in ("normal", "overlap")}, done.output


def test_a_record_says_how_sure_it_is_and_comes_back_so(runs, tmp_path):
    record = runs[0]["overlap"]
    assert record.meta["accuracy"]["bands"]["ttft"]["low"] == -0.5
    assert set(record.meta["rests_on"]) == {"steps", "host", "links"}
    assert record.meta["rests_on"]["links"] == "none: one GPU"
    write_record(record, tmp_path / "again")
    assert read_record(tmp_path / "again").meta == record.meta
    numbers = accuracy_numbers(record, summary := summarise(record))
    assert numbers is not None
    ttft_s = summary["ttft_mean_s"]
    assert ttft_s is not None
    assert numbers["ranges"]["ttft_mean_s"] == pytest.approx((2 * ttft_s, 2 * ttft_s))
    assert numbers["bands"] == record.meta["accuracy"]["bands"]


def test_the_terminal_has_ranges_and_what_they_rest_on(runs):
    output = runs[1]
    assert "Where it really would be, 8 times in 10" in output
    assert "(40 rows of sglang on hopper, dense, tp 1, cost roofline)" in " ".join(output.split())
    assert "host: preset sglang-0.5.23" in output and "links: none: one GPU" in output
    page = Path(output.strip().splitlines()[-1].removeprefix("report: ")).read_text()
    assert 'id="sure"' in page and "40 rows of sglang on hopper" in page


def test_two_runs_on_the_same_hardware_differ_by_less_than_either_is_off(runs):
    records, _ = runs
    summaries = {name: summarise(record) for name, record in records.items()}
    (line,) = difference_lines(summaries, records, "normal")
    one, other = (summaries[name]["tpot_mean_s"] for name in ("overlap", "normal"))
    assert one and other
    most = np.log(1 - 0.2 * 1.0) - np.log(1 - 0.2 * 1.01)
    low, high = (one / other * np.exp(sign * most) - 1 for sign in (-1, 1))
    assert f"TPOT mean {one / other - 1:+.1%} (really {low:+.1%} to {high:+.1%})" in line
    # Another model has errors of its own.
    moved = replace(records["overlap"], meta={**records["overlap"].meta, "model": "another"})
    assert difference_lines(summaries, {**records, "overlap": moved}, "normal") == []


def test_throughput_has_a_range_only_where_arrivals_do_not_decide_it(runs):
    record = runs[0]["overlap"]
    assert "output_throughput" in ranges(record, summarise(record))
    settings = {**record.meta["settings"], "concurrency": None}
    opened = replace(record, meta={**record.meta, "settings": settings})
    assert set(ranges(opened, summarise(record))) == {"ttft_mean_s", "tpot_mean_s", "e2e_mean_s"}


def test_a_record_without_says_nothing(runs):
    record = runs[0]["overlap"]
    meta = {name: value for name, value in record.meta.items() if name not in ("accuracy", "rests_on")}
    bare: dict[str, RunRecord] = {"one": replace(record, meta=meta)}
    summaries = {"one": summarise(record)}
    assert accuracy_lines(bare) == [] and range_rows(bare, summaries) == {}
    assert accuracy_numbers(bare["one"], summaries["one"]) is None


def test_json_has_it(errors_of_sglang, tmp_path):
    said = ["simulate", str(SAMPLE), "--requests", "5", "--engine", "sglang", "--json", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, said)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["runs"]["overlap"]["accuracy"]
    assert found["bands"]["tpot"]["rows"] == 40 and set(found["ranges"]) == {"ttft_mean_s", "tpot_mean_s", "e2e_mean_s"}


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        **{"id": "one", "engine": "vllm", "version": "0.19.0", "model": "meta-llama/Llama-3.1-8B"},
        **{"system": "h100_sxm", "mode": "agg", "precision": "", "input_tokens": 64, "output_tokens": 101},
        **{"concurrency": 4, "tp": 1, "dp": 1, "ep": 1, "shortest": 1.0, "ttft_s": 0.1, "tpot_s": 0.01},
        **{"configuration": SCORING},
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


SCORING, FITTING = "vllm|b", "vllm|d"


def test_the_scoreboard_writes_the_errors_of_the_scoring_half_by_row(tmp_path):
    assert row().scores and not row(configuration=FITTING).scores
    predicted = [
        Predicted(row(concurrency=64), 0.2, 0.02),
        Predicted(row(), 0.05, 0.011),
        Predicted(row(id="again"), 0.05, 0.011),
        Predicted(row(configuration=FITTING), 0.1, 0.1),
    ]
    (found,) = groups_of(predicted, "roofline")
    # By requests at a time; TTFT up to 16 of them alone; what is published twice, once. E2E: 0.05 + 100 x 0.011 of 1.1 s.
    assert found == group([[0, -0.5, 0.1, round(1.15 / 1.1 - 1, 4)], [0, None, 1.0, 1.0]])


def test_a_slice_of_the_rows_does_not_replace_what_more_of_them_said(tmp_path):
    path = tmp_path / "accuracy.json"
    assert keep_errors({"roofline": [Predicted(row(), 0.1, 0.01)]}, 4, path) == []
    assert keep_errors({"measured": [Predicted(row(), 0.1, 0.02)]}, 24, path) == []
    before = path.read_text()
    assert [group["cost"] for group in json.loads(before)["groups"]] == ["roofline", "measured"]
    (line,) = keep_errors({"roofline": [Predicted(row(), 0.3, 0.03)]}, 24, path)
    assert "roofline: stays as it is" in line and path.read_text() == before
    assert keep_errors({"roofline": [Predicted(row(), 0.3, 0.03)]}, 1, path) == []
    assert json.loads(path.read_text())["every"] == {"roofline": 1, "measured": 24}


def test_the_errors_that_come_with_the_package_are_of_its_cases():
    recorded = accuracy.read_recorded()
    assert recorded["every"] and recorded["groups"]
    for of in recorded["groups"]:
        assert of["engine"] in ("vllm", "sglang", "trtllm") and of["family"] and of["cost"] in recorded["every"]
        assert all(len(each) == 4 and all(e is None or e > -1 for e in each[1:]) for each in of["rows"])


def repeated(tmp_path: Path, *more: str) -> dict[str, Any]:
    chance = "--policy random --max-running 2"
    said = f"simulate {SAMPLE} --requests 30 --loop normal,overlap {chance} --force --json --out {tmp_path / 'out'}".split()
    done = CliRunner().invoke(app, [*said, *more])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_repeated_runs_are_those_of_the_seeds_that_follow(tmp_path):
    found = repeated(tmp_path, "--repeat", "3", "--seed", "5")
    alone = [repeated(tmp_path, "--seed", str(seed)) for seed in (5, 6, 7)]
    for name in ("normal", "overlap"):
        each = [one["runs"][name]["metrics"]["e2e_mean_s"] for one in alone]
        assert found["runs"][name]["seeds"]["e2e_mean_s"] == each and len(set(each)) > 1
        assert "seeds" not in alone[0]["runs"][name]


def test_differences_are_taken_seed_by_seed():
    def of(normal_s: float, overlap_s: float) -> dict[str, dict[str, float | int | None]]:
        return {"normal": {"e2e_mean_s": normal_s}, "overlap": {"e2e_mean_s": overlap_s}}

    lines = seed_lines([of(1.0, 0.9), of(2.0, 1.7)], "normal")
    assert lines == [
        "normal over 2 seeds: E2E mean 1.000 s to 2.000 s",
        "overlap over 2 seeds: E2E mean 0.900 s to 1.700 s",
        "overlap against normal over 2 seeds: E2E mean -15.0% to -10.0%",
    ]
    (line,) = seed_lines([of(1.0, 0.9), of(1.0, 0.9)], "normal")
    assert line == "2 seeds change nothing: nothing in these runs is drawn at random"


def test_fewer_than_one_run_is_refused():
    done = CliRunner().invoke(app, ["simulate", str(SAMPLE), "--repeat", "0"])
    assert done.exit_code == 2 and done.stderr == "error: repeat: 0 is less than 1\n"
