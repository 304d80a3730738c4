"""``workbench replay`` as a user meets it, on a tiny model and a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from reports.record.run_record import read_meta
from tests.meta_form import check_meta
from tests.patience import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-c", "from workbench.cli.main import main; main()"]


def workbench(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: Any) -> Path:
    """Two requests at once, one later, and a session of two turns."""
    path = tmp_path_factory.mktemp("trace") / "few.jsonl"
    lines: list[dict[str, Any]] = [
        {"request_id": "a", "arrival_s": 0.0, "input_length": 20, "output_length": 5},
        {"request_id": "b", "arrival_s": 0.0, "input_length": 30, "output_length": 1},
        {"request_id": "s1", "arrival_s": 0.1, "input_length": 16, "output_length": 4, "session_id": "s", "turn": 0},
        {"request_id": "c", "arrival_s": 0.6, "input_length": 12, "output_length": 7},
        {"request_id": "s2", "session_id": "s", "turn": 1, "think_time_s": 0.3, "input_length": 30, "output_length": 3},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_a_trace_is_replayed_in_real_time_and_leaves_records_and_a_report(
    model: Path, trace: Path, tmp_path: Path
) -> None:
    done = workbench(
        "replay",
        trace,
        "--model",
        model,
        "--backend",
        "cpu",
        "--loop",
        "normal,overlap",
        "--kv-tokens",
        1000,
        "--max-context",
        200,
        "--out",
        tmp_path / "o",
        "--decisions",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o/report.html").is_file()
    for loop in ("normal", "overlap"):
        meta = read_meta(tmp_path / "o" / loop)
        check_meta(meta, "replayed")
        assert meta["hardware"]["simulated"] is False and meta["settings"]["backend"] == "cpu"
        assert (tmp_path / "o" / loop / "decisions.jsonl").read_text().count("\n") == meta["totals"]["iterations"]
        table = pd.read_csv(tmp_path / "o" / loop / "requests.csv").set_index("request_id")
        assert list(table["output_tokens"][["a", "b", "c", "s1", "s2"]]) == [5, 1, 7, 4, 3]
        assert set(table["status"]) == {"finished"}
        ordered = table[["arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s"]]
        assert (ordered.diff(axis=1).iloc[:, 1:] >= 0).all().all()
        assert table.loc["c", "queued_s"] >= 0.6
        # The second turn waits for the first to end and for its user to think.
        assert table.loc["s2", "arrival_s"] >= table.loc["s1", "finish_s"] + 0.3


@pytest.mark.slow
def test_dummy_weights_need_a_configuration_alone(model: Path, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((model / "config.json").read_text())
    arguments = ("--backend", "cpu", "--kv-tokens", 1000, "--max-context", 200, "--out", tmp_path / "o", "--json")
    done = workbench("replay", trace, "--model", tmp_path / "bare", "--load-format", "dummy", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ("--model", tmp_path / "bare", "--load-format", "dummy", "--dtype", "fp8", *arguments, "--force")
    done = workbench("replay", trace, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "o/overlap/meta.json").read_text())["settings"]
    assert (settings["dtype"], settings["kv_dtype"]) == ("fp8", "fp32")
    refused = workbench("replay", trace, "--model", tmp_path / "bare", *arguments, "--force", cwd=tmp_path)
    assert refused.returncode == 2 and "safetensors" in refused.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["--model", "nowhere/at-all-really"], "nowhere/at-all-really"),
        (["--backend", "tpu"], "backend: 'tpu' is not one of auto, cpu, cuda"),
        (["--dtype", "int4"], "dtype: 'int4' is not one of"),
        (["--loop", "sideways"], "loop: 'sideways' is not one of"),
        (["--load-format", "pickle"], "load_format: 'pickle' is not one of"),
        (["--tp", "3"], "cannot be split over 3 GPUs"),
        (["--max-context", "100000"], "a context of 100000 tokens is not within 1 to 256"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, trace: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    given = ["--model", str(model), "--backend", "cpu", "--out", str(tmp_path / "o"), "--json", *words]
    done = workbench("replay", trace, *given, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_ctrl_c_keeps_what_was_replayed(ranks: int, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "slow.jsonl"
    lines = [{"request_id": f"r{i}", "arrival_s": i * 0.2, "input_length": 9, "output_length": 2} for i in range(500)]
    lines.append({**lines[0], "request_id": "never", "arrival_s": 1e6})
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [
        "replay",
        trace,
        "--model",
        model,
        "--backend",
        "cpu",
        "--kv-tokens",
        1000,
        "--max-context",
        200,
        "--tp",
        ranks,
    ]
    process = subprocess.Popen(
        [*CLI, *map(str, words), "--out", str(tmp_path / "o"), "--decisions"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    decisions = tmp_path / "o/.overlap.decisions.jsonl"
    until(lambda: (decisions.exists() and decisions.stat().st_size > 0) or process.poll() is not None, "decisions")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    table = pd.read_csv(tmp_path / "o/overlap/requests.csv")
    assert 0 < len(table) < 501
    assert json.loads((tmp_path / "o/overlap/meta.json").read_text())["interrupted"] is True


@pytest.mark.slow
def test_a_preset_of_an_engine_replays_with_its_rules_and_says_what_is_for_simulation(
    model: Path, trace: Path, tmp_path: Path
) -> None:
    words = ["replay", trace, "--model", model, "--backend", "cpu", "--engine", "vllm-0.12", "--kv-tokens", "512"]
    done = workbench(*words, "--max-context", "64", "--evict-amount", "all", "--out", tmp_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = read_meta(tmp_path / "normal")["settings"]
    assert (settings["engine"], settings["batching"], settings["cache"]) == ("vllm-0.12.0", "mixed", "blocks")
    assert (settings["page_size"], settings["max_batch_tokens"]) == (16, 8192), "on a CPU, those without a GPU"
    first, second = done.stderr.splitlines()
    assert first.startswith("note: engine: rules, loop and limits are those of vllm-0.12.0; its CPU phases, graphs, ")
    assert second.startswith("note: rules: not those of vllm-0.12.0: evict_amount is missing there, not all; ")
