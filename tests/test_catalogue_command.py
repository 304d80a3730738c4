"""``workbench catalogue``: what is known by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu
from backends.simulated.catalogue.model_specs import load_model, model_names


def catalogue(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from workbench.cli.main import main; main()", "catalogue", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_gpu_and_model_has_a_line_and_a_row_of_json():
    shown = catalogue()
    assert shown.returncode == 0, shown.stderr
    firsts = {line.split()[0] for line in shown.stdout.splitlines() if line.strip()}
    assert firsts >= {*gpu_names(), *model_names()}
    rows = json.loads(catalogue("--json").stdout)
    assert [row["gpu"] for row in rows["gpus"]] == gpu_names()
    kv = {row["model"]: row["kv_bytes_per_token"] for row in rows["models"]}
    # Keys and values of 32 layers, 8 heads of 128, in two bytes.
    assert kv["meta-llama/Llama-3.1-8B"] == 2 * 32 * 8 * 128 * 2


def test_one_of_them_is_shown_with_what_a_prediction_takes_from_it():
    gpu = json.loads(catalogue("h100", "--json").stdout)
    assert gpu["source"] == load_gpu("h100").source and gpu["kv_efficiency"] == load_gpu("h100").kv_efficiency
    assert "memory_bandwidth            3.35 T" in catalogue("h100").stdout
    shown = catalogue("Qwen/Qwen3-30B-A3B").stdout
    assert "weight_bytes_bf16           61.06 G" in shown and "True in 48 layers" in shown


def test_every_gpu_names_its_source():
    assert all(len(load_gpu(name).source) > 10 for name in gpu_names())
    assert len(model_names()) >= 15 and all(load_model(name).parameters > 1e8 for name in model_names())


def test_a_file_of_ones_own_is_shown_or_refused_with_what_is_wrong_in_it(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("memory_bytes = 1e9\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\n")
    assert json.loads(catalogue(str(mine), "--json").stdout)["name"] == "mine"
    mine.write_text(mine.read_text() + 'reaches_like = "h100"\n')
    shown = catalogue(str(mine), "--json")
    assert json.loads(shown.stdout)["kv_efficiency"] == load_gpu("h100").kv_efficiency
    assert shown.stderr.startswith(f"note: {mine}: reaches_like: is called efficiency_like now")
    mine.write_text("memory_bytes = 1e9\nkv_efficiency = 2\n")
    assert catalogue(str(mine)).stderr == f"error: {mine}: memory_bandwidth: missing\n"
    (tmp_path / "config.json").write_text("{")
    assert catalogue(str(tmp_path)).stderr.startswith(f"error: {tmp_path / 'config.json'}")


@pytest.mark.parametrize(("name", "near"), [("h10", "h100"), ("meta-llama/Llama-3.1-9B", "meta-llama/Llama-3.1-8B")])
def test_an_unknown_name_is_refused_with_the_nearest_in_one_line(name, near):
    done = catalogue(name)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: no GPU or model {name!r}; nearest: ") and near in done.stderr
