"""Predictions against measurements: no error may grow by more than a tenth over its recorded value."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks import scoreboard
from benchmarks.board import truth
from benchmarks.board.errors import errors_of, grouped, kind_of, table
from benchmarks.board.pages import between_markers
from benchmarks.board.predict import COSTS, Predicted
from benchmarks.board.results import Results
from benchmarks.board.silicon import find_rows, read_rows
from tests.fidelity.rows import row, written

RECORDED = json.loads(scoreboard.RECORDED.read_text())


@pytest.fixture(scope="module")
def scores() -> list[truth.Score]:
    found, skipped = truth.run()
    if not found:
        pytest.skip("; ".join(skipped))
    return found


def test_no_error_of_a_measured_run_has_grown_by_more_than_a_tenth(scores):
    found = {"runs": scoreboard.errors_of_runs(scores), "rows": {}}
    assert scoreboard.grown(found, RECORDED) == []


def test_every_recorded_case_that_has_data_is_scored(scores):
    here = {case.name for case in truth.cases()}
    assert here & set(RECORDED["runs"]) <= {score.case for score in scores}


def test_requests_of_the_measured_run_are_predicted_one_by_one(scores):
    """The aims of the project on this run."""
    found = next(score for score in scores if score.case == "RTXPRO6000_Llama-3.1-8B").errors
    assert found["ttft_each"] < 0.10 and found["tpot_each"] < 0.02 and found["e2e_each"] < 0.02
    assert all(abs(found[name]) < 0.02 for name in ("ttft_mean", "tpot_mean", "e2e_mean"))


def test_a_run_that_cannot_be_scored_is_named_and_the_others_are_scored(tmp_path):
    for name, text in (("NOGPU_Nothing", "{}"), ("H100_Broken", "not JSON"), ("H100_Short", "")):
        folder = tmp_path / "truth" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0"}')
        (folder / "requests.jsonl").write_text(text + "\n")
    found, skipped = truth.run(tmp_path)
    assert found == []
    assert [line.split(":")[0] for line in skipped] == ["H100_Broken", "H100_Short", "NOGPU_Nothing"]
    assert "requests.jsonl: line 1: queued_ts: missing" in skipped[2]


def test_a_recorded_run_that_is_there_and_cannot_be_scored_is_worse(tmp_path):
    folder = tmp_path / "truth" / "RTXPRO6000_Llama-3.1-8B"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "requests.jsonl").write_text("not JSON\n")
    runs, _ = truth.run(tmp_path)
    assert scoreboard.lost(runs, RECORDED, tmp_path) == ["RTXPRO6000_Llama-3.1-8B: could be scored before"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", scoreboard.MODES)
@pytest.mark.parametrize("cost", COSTS)
def test_no_error_of_a_slice_of_the_published_rows_has_grown_by_more_than_a_tenth(cost, mode):
    path = find_rows()
    assert path is not None, "the development environment has aiconfigurator-core"
    every, at_most = scoreboard.SLICES[mode]
    predicted, _ = scoreboard.score_rows(path, every, 1, cost, mode=mode, at_most=at_most)
    name = scoreboard.slice_of(every, cost, mode, at_most)
    assert name in RECORDED["rows"] and predicted
    assert scoreboard.grown({"runs": {}, "rows": {name: scoreboard.errors_of_rows(predicted, mode)}}, RECORDED) == []


def test_a_file_in_another_form_is_refused_with_its_line(tmp_path):
    path = written(tmp_path / "s.csv", {"batch_size": "many"})
    with pytest.raises(ValueError, match=r"s\.csv: line 2: "):
        read_rows(path)
    ran = CliRunner().invoke(_app(), ["--rows", str(path)])
    assert ran.exit_code == 2 and "line 2" in ran.stderr
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"line 1: .*: no such column"):
        read_rows(tmp_path / "t.csv")


def _app():
    import typer

    app = typer.Typer()
    app.command()(scoreboard.main)
    return app


def test_errors_are_signed_and_ttft_counts_at_few_requests_only():
    found = errors_of(
        [Predicted(row(), 0.11, 0.009), Predicted(row(), 0.09, 0.012), Predicted(row(concurrency=64), 9.0, 0.010)]
    )
    assert (found.rows, found.ttft_rows) == (3, 2)
    assert (found.tpot_median, found.tpot_mean, found.tpot_bias) == pytest.approx((0.1, 0.1, 0.03333), abs=1e-4)
    assert (found.ttft_mean, found.ttft_bias) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert set(grouped([Predicted(row(), 1, 1)], lambda one: kind_of(one.row.model))) == {"dense"}


def test_the_kind_of_a_model_is_what_its_layers_are():
    kinds = {
        "nvidia/Llama-3.1-8B-Instruct-FP8": "dense",
        "Qwen/Qwen3-235B-A22B-FP8": "experts",
        "Qwen/Qwen3.5-397B-A17B": "linear attention, experts",
        "moonshotai/Kimi-K2.5": "latent attention, experts",
        "zhipuai/GLM-5": "latent attention, experts",
        "openai/gpt-oss-120b": "experts, windows",
    }
    assert {model: kind_of(model) for model in kinds} == kinds


def test_an_error_that_grew_by_more_than_a_tenth_is_worse_and_noise_is_not():
    recorded = {
        "runs": {"a": {"e2e_mean": 0.05}, "b": {"e2e_mean": 0.0001}},
        "rows": {"every 1": {"g": {"tpot_mean": 0.1}}},
    }
    same = {"runs": {"a": {"e2e_mean": -0.0549}, "b": {"e2e_mean": 0.002}}, "rows": {"every 1": {"g": {"rows": 9.0}}}}
    assert scoreboard.grown(same, recorded) == []
    worse = {"runs": {"a": {"e2e_mean": 0.056}}, "rows": {"every 1": {"g": {"tpot_mean": -0.12}}}}
    assert scoreboard.grown(worse, recorded) == [
        "a: e2e_mean +5.60%, recorded +5.00%",
        "g: tpot_mean -12.00%, recorded +10.00%",
    ]


def test_rows_that_are_no_longer_predicted_are_worse_and_further_ones_are_not():
    recorded = {"runs": {}, "rows": {"every 1": {"g": {"rows": 9, "tpot_mean": 0.1}, "h": {"rows": 2}}}}
    more = {"g": {"rows": 10, "tpot_mean": 0.1}, "h": {"rows": 2}, "i": {"rows": 1}}
    assert scoreboard.grown({"runs": {}, "rows": {"every 1": more}}, recorded) == []
    fewer = {"g": {"rows": 8, "tpot_mean": 0.01}}
    assert scoreboard.grown({"runs": {}, "rows": {"every 1": fewer}}, recorded) == [
        "g: 8 rows predicted, recorded 9",
        "h: 0 rows predicted, recorded 2",
    ]


def test_predictions_that_are_kept_are_not_made_again_and_a_line_cut_short_is(tmp_path):
    rows = [row(id=name) for name in ("a", "b", "c")]
    first = Results(tmp_path, "roofline")
    first.add(rows[0], Predicted(rows[0], 0.1, 0.02, ("experts",)))
    first.add(rows[1], "vllm: precision int3")
    with (tmp_path / "roofline.jsonl").open("a") as file:
        file.write('{"id": "c", "ttft_s": 0.')
    again = Results(tmp_path, "roofline")
    assert again.missing(rows) == [rows[2]] and Results(tmp_path, "measured").missing(rows) == rows
    assert again.of(rows[:2]) == [Predicted(rows[0], 0.1, 0.02, ("experts",)), "vllm: precision int3"]
    again.add(rows[2], Predicted(rows[2], 0.1, 0.01))
    assert Results(tmp_path, "roofline").missing(rows) == []


def test_both_costs_stand_side_by_side_and_a_group_says_how_many_rows_had_tables():
    one, two = row(id="one"), row(id="two", system="tpu")
    half = {
        "roofline": [Predicted(one, 0.1, 0.012), Predicted(two, 0.1, 0.016)],
        "measured": [Predicted(one, 0.1, 0.011)],
    }
    lines = table(half, "engine")
    assert lines[2] == (
        "| vllm | 2 | 40.0% | 40.0% | +40.0% | 1 | 20.0% | 10.0% | 10.0% | +10.0% "
        "| 2 | 0.0% | +0.0% | 1 | 0.0% | 0.0% | +0.0% |"
    )
    by_gpu = table(half, "engine and GPU")
    assert by_gpu[3].startswith("| vllm, tpu | 1 | 60.0% | 60.0% | +60.0% | 0 |  |  |  |  | 1 |")


@pytest.mark.parametrize(("every", "on_the_page"), [(1, "1 of 1 rows predicted."), (2, "old")])
def test_a_slice_of_the_rows_is_kept_beside_all_and_does_not_take_their_place_on_the_page(
    tmp_path, monkeypatch, every, on_the_page
):
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    parts = ("rows", "runs")
    page.write_text(
        "".join(f"<!-- scoreboard {part}: begin -->\nold\n<!-- scoreboard {part}: end -->\n" for part in parts)
    )
    kept.write_text('{"runs": {}, "rows": {"every 3": {"g": {"rows": 9}}}}')
    monkeypatch.setattr(scoreboard, "PAGE", page)
    monkeypatch.setattr(scoreboard, "RECORDED", kept)
    monkeypatch.setattr(scoreboard, "ACCURACY", kept.with_name("accuracy.json"))
    monkeypatch.setattr(truth, "run", lambda: ([], []))
    rows = written(tmp_path / "s.csv", {"isl": "64", "osl": "8", "batch_size": "2"})
    ran = CliRunner().invoke(_app(), ["--rows", str(rows), "--every", str(every), "--jobs", "1", "--write"])
    assert ran.exit_code == 0, ran.output
    assert page.read_text().splitlines()[1] == on_the_page
    assert page.read_text().splitlines()[-2] == "old", "no run could be scored"
    assert set(json.loads(kept.read_text())["rows"]) == {"every 3", f"every {every}", f"every {every}, measured"}


def test_tables_go_between_their_markers_and_nothing_else_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- scoreboard rows: begin -->\nold\n<!-- scoreboard rows: end -->\ntail\n")
    assert between_markers(page, {"rows": "new"}) == page.read_text().replace("old", "new")
    with pytest.raises(ValueError, match="no such place"):
        between_markers(page, {"runs": "new"})
