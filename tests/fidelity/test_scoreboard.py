"""Predictions against measured runs: no error may grow by more than a tenth over its recorded value."""

from __future__ import annotations

import json

import pytest

from benchmarks import fidelity


@pytest.fixture(scope="module")
def scores() -> list[fidelity.Score]:
    found, skipped = fidelity.run()
    if not found:
        pytest.skip("; ".join(skipped))
    return found


def test_no_error_has_grown_by_more_than_a_tenth(scores):
    recorded = json.loads(fidelity.RECORDED.read_text())
    assert fidelity.grown(scores, recorded) == []


def test_every_recorded_case_that_has_data_is_scored(scores):
    here = {case.name for case in fidelity.cases()}
    assert here & set(json.loads(fidelity.RECORDED.read_text())) <= {score.case for score in scores}


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
    found, skipped = fidelity.run(tmp_path)
    assert found == []
    assert [line.split(":")[0] for line in skipped] == ["H100_Broken", "H100_Short", "NOGPU_Nothing"]
    assert "requests.jsonl: line 1: queued_ts: missing" in skipped[2]


def test_a_recorded_run_that_is_there_and_cannot_be_scored_fails_the_check(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "truth" / "RTXPRO6000_Llama-3.1-8B"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "requests.jsonl").write_text("not JSON\n")
    monkeypatch.setattr("sys.argv", ["fidelity.py", "--data", str(tmp_path), "--check"])
    with pytest.raises(SystemExit) as stopped:
        fidelity.main()
    assert stopped.value.code == 1
    assert "worse: RTXPRO6000_Llama-3.1-8B: could be scored before" in capsys.readouterr().err


def test_growth_is_counted_from_the_recorded_value_and_noise_is_not():
    def score(value: float) -> fidelity.Score:
        return fidelity.Score("x", {"tpot_mean": value}, {}, None, [])  # type: ignore[arg-type]

    assert fidelity.grown([score(-0.021)], {"x": {"tpot_mean": 0.02}}) == []
    assert fidelity.grown([score(-0.023)], {"x": {"tpot_mean": 0.02}}) == ["x: TPOT mean -2.30%, recorded +2.00%"]
    assert fidelity.grown([score(0.002)], {"x": {"tpot_mean": 0.0001}}) == []
    assert fidelity.grown([score(0.5)], {}) == []
