"""Coefficients fitted to records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.cost_request import CostError, CostRequest
from backends.simulated.cost.models.fitted import Coefficients, fit_steps
from backends.simulated.cost.models.operator_tables import ProfileError
from backends.simulated.cost.tables.fitted_file import load_fitted
from backends.simulated.host_fit import fit_host
from reports.record.errors import RecordError
from reports.record.run_record import read_record
from tests.cost.test_profile import ROOT, workbench
from tests.reports.records import record_of, request_row
from workbench.calibrate.fit import fit_record

SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"


def test_a_fit_finds_the_coefficients_that_made_the_steps():
    rng = np.random.default_rng(1)
    true = Coefficients((8e-3, 2e-6, 30e-6, 5e-6, 40e-9, 1e-3, 0.0), 128)
    decodes = rng.integers(1, 128, 400).astype(float)
    context = decodes * rng.integers(100, 3000, 400)
    prompt = np.where(rng.random(400) < 0.3, rng.integers(10, 1500, 400), 0).astype(float)
    seconds = np.array([true.seconds(p, d, c, 0.0) for p, d, c in zip(prompt, decodes, context, strict=True)])
    fit = fit_steps(prompt, decodes, context + prompt, (prompt > 0).astype(float), seconds)
    assert fit.mean_error < 0.002 and abs(fit.total_error) < 0.002
    assert fit.coefficients.knee_tokens == 128
    assert fit.coefficients.values[4] == pytest.approx(40e-9, rel=0.02)


def test_steps_alike_get_their_mean_however_they_scatter():
    rng = np.random.default_rng(2)
    decodes = rng.integers(1, 64, 2000).astype(float)
    seconds = (5e-3 + 1e-4 * decodes) * rng.lognormal(-0.5 * 0.4**2, 0.4, 2000)  # a mean of 1, often far from it
    fit = fit_steps(np.zeros(2000), decodes, decodes * 100, np.zeros(2000), seconds)
    assert abs(fit.total_error) < 0.01
    assert fit.mean_error > 0.2


def test_no_coefficient_is_negative_even_when_the_data_ask_for_it():
    decodes = np.arange(1, 61, dtype=float)
    fit = fit_steps(np.zeros(60), decodes, decodes * 100, np.zeros(60), 1e-2 - decodes * 1e-5)
    assert min(fit.coefficients.values) >= 0
    assert fit.coefficients.seconds(0, 1e4, 1e6, 0) >= fit.coefficients.seconds(0, 1, 1, 0)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="3 steps are too few"):
        fit_steps(np.zeros(3), np.ones(3), np.ones(3), np.zeros(3), np.ones(3))
    empty = record_of([request_row(request_id="a", arrival_s=0.0, finish_s=1.0)])
    with pytest.raises(RecordError, match="no iterations"):
        fit_record(empty, Path("somewhere"), Path("nowhere"))


def test_host_phases_are_recovered_phase_by_phase():
    rng = np.random.default_rng(2)
    n = 500
    prompts = (rng.random(n) < 0.3) * rng.integers(1, 4, n)
    decodes = rng.integers(1, 100, n)
    tokens = prompts * 300
    requests = prompts + decodes
    rows = {
        "decode_tokens": decodes,
        "requests": requests,
        "prefill_tokens": tokens,
        "receive_s": 5e-6 + 20e-6 * prompts,
        "schedule_s": 40e-6 + 0.4e-6 * requests + 15e-6 * prompts,
        "launch_host_s": np.where(prompts == 0, 200e-6, 900e-6) + 1e-6 * requests,
        "process_s": 30e-6 + 2e-6 * requests,
    }
    host, errors = fit_host(rows)
    assert host["schedule_request_s"] == pytest.approx(0.4e-6, rel=0.01)
    assert host["prepare_s"] + host["graph_s"] == pytest.approx(200e-6, rel=0.01)
    assert host["prepare_s"] + host["eager_s"] == pytest.approx(900e-6, rel=0.01)
    assert all(abs(error) < 0.01 for error in errors.values())


@pytest.mark.slow
def test_calibrating_from_a_record_and_simulating_with_it_gives_the_record_again(tmp_path):
    first = workbench(
        "simulate", SAMPLE, "--requests", 80, "--ignore-eos", "--out", tmp_path / "a", "--batching", "mixed"
    )
    assert first.returncode == 0, first.stderr
    fitted = tmp_path / "fitted.json"
    done = workbench("calibrate", "--from", tmp_path / "a/overlap", "--out", fitted)
    assert done.returncode == 0 and "steps: off by" in done.stdout, done.stderr
    again = workbench(
        "simulate", SAMPLE, "--like", tmp_path / "a/overlap", "--cost", f"fitted:{fitted}", "--out", tmp_path / "b"
    )
    assert again.returncode == 0, again.stderr
    compared = workbench("compare", tmp_path / "a/overlap", tmp_path / "b/overlap", "--json")
    errors = json.loads(compared.stdout)["latencies"]
    assert abs(errors["e2e"]["mean"]) < 0.03 and abs(errors["tpot"]["mean"]) < 0.03
    kept = workbench("calibrate", "--from", tmp_path / "a/overlap", "--out", fitted)
    assert kept.returncode == 2 and "--force" in kept.stderr
    assert read_record(tmp_path / "b/overlap").meta["settings"]["batching"] == "mixed"


def test_fitted_costs_of_another_model_or_with_a_bad_number_are_refused(tmp_path):
    folder = tmp_path / "a"
    assert workbench("simulate", SAMPLE, "--requests", 30, "--out", folder).returncode == 0
    file = tmp_path / "f.json"
    fit_record(read_record(folder / "overlap"), folder, file)
    want = CostRequest(load_model("Qwen/Qwen3-8B"), load_gpu("h100"))
    with pytest.raises(CostError, match=r"measured with meta-llama/Llama-3\.1-8B, not Qwen/Qwen3-8B"):
        load_fitted(file, want)
    content = json.loads(file.read_text())
    content["stages"][0]["step_s"] = -1
    file.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=r"stages\[0\].step_s: -1 is not a number"):
        load_fitted(file, CostRequest(load_model("meta-llama/Llama-3.1-8B"), load_gpu("h100")))
