"""benchmarks/gpu.py: it runs where only torch and its companions are, and all of it works before a GPU is lent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
ABSENT = ("simpy", "msgspec", "starlette", "uvicorn", "zmq", "pydantic", "zstandard", "optuna")
"""What the GPU machine does not have."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.slow
def test_it_imports_without_what_a_bare_machine_lacks() -> None:
    modules = (
        "benchmarks.gpu",
        "benchmarks.kernels",
        "benchmarks.offline",
        "benchmarks.open_loop",
        "benchmarks.fp8",
        "benchmarks.gpu_calibrate",
        "benchmarks.gpu_checks",
        "benchmarks.gpu_run",
        "backends.torch.backend",
        "backends.torch.cuda_graphs",
        "workbench.scheduler.scheduler",
        "workbench.loops",
        "workbench.loops.drive",
    )
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({ABSENT!r}))", *(f"import {name}" for name in modules)]
    done = run("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(str(SCRIPT), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    blocked = f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv = sys.argv[1:]; "
    blocked += "sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run("-c", blocked, str(SCRIPT), "--out", str(out), "--device", "cpu", "--quick", "--budget-s", "1e9")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert results["failed"] == []
    sections = {"kernel_checks", "kernels", "loops", "end_to_end", "calibration", "fidelity", "fp8"}
    assert sections | {"environment", "timing"} <= set(results)
    assert len(results["end_to_end"]["qwen3-14b"]["overlap"]) == 3
    assert len(results["end_to_end"]["qwen3-0.6b"]["transformers"]["tokens_per_s"]) == 3
    assert all(len(row["seconds"]) == 3 for row in results["kernels"]["decode"])
    assert len(results["loops"]["overlap"]) == 3
    for of_shape in results["fp8"].values():
        assert len(of_shape["overlap"]) == 3 and 0.9 < of_shape["quality"]["cosine_least"] < 1
    assert {entry["what"] for entry in results["skipped"]} == {
        "greedy tokens with CUDA graphs, launches that wait for nothing",
        "cost of CUDA graphs",
    }
    # The table comes last, and names what was left out.
    assert done.stdout.splitlines()[-1].startswith("skipped: ")

    from reports.record.run_record import read_record
    from traces import open_trace
    from workbench.calibrate.operator_profile import write_operators
    from workbench.calibrate.points import fit_points

    points = out / "calibration.points"
    of_loop = [len(list(points.glob(f"*.{loop}.json"))) for loop in ("normal", "overlap")]
    assert min(of_loop) >= 3 and results["calibration"]["points"] == sum(of_loop)
    costs = fit_points(points, tmp_path / "costs.json")
    assert (costs["gpu"], costs["dtype"], costs["measured"]["model"]) == ("cpu", "fp32", "Qwen/Qwen3-0.6B")
    profile = write_operators(points, tmp_path / "profile")
    assert profile["operators"]["steps"] == results["calibration"]["steps_by_operator"] >= 10
    assert costs["stages"][0]["steps"] > 50 and set(costs["host"]) >= {"schedule_s", "process_s"}
    for share in (50, 80, 95):
        trace = list(open_trace(str(out / "fidelity" / f"trace-{share}.jsonl")))
        for loop in ("normal", "overlap"):
            record = read_record(out / "fidelity" / f"{share}-{loop}-3")
            assert record.name == loop
            assert list(record.requests["request_id"]) == [request.request_id for request in trace]
            assert list(record.requests["output_tokens"]) == [request.output_length for request in trace]
            assert set(record.requests["status"]) == {"finished"}
    # The commands of docs/runner.md, with what it left.
    run_of, simulated = out / "fidelity" / "80-overlap-1", tmp_path / "sim"
    for words in (
        [
            "simulate",
            out / "fidelity" / "trace-80.jsonl",
            "--like",
            run_of,
            "--cost",
            f"fitted:{tmp_path / 'costs.json'}",
            "--out",
            tmp_path / "fitted",
        ],
        [
            "simulate",
            out / "fidelity" / "trace-80.jsonl",
            "--like",
            run_of,
            "--cost",
            f"profile:{tmp_path / 'profile'}",
            "--out",
            simulated,
        ],
        ["compare", run_of, simulated / "overlap"],
    ):
        told = run("-c", "from workbench.cli.main import main; main()", *map(str, words))
        assert told.returncode == 0, told.stdout + told.stderr


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu_run import Run

    run = Run(tmp_path, "cpu", False, 100.0)
    assert run.fits("short", 5)
    assert not run.fits("long", 1000)
    (entry,) = json.loads((tmp_path / "skipped.json").read_text())
    assert entry["what"] == "long" and "1000 s" in entry["why"]


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    done = run(str(SCRIPT), "--out", str(tmp_path), "--only", "kernels,lops")
    assert done.returncode == 2 and "lops" in done.stderr


def test_a_launch_that_waits_for_the_device_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_checks, gpu_run

    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    for problem in ("called a synchronizing CUDA operation", None):
        run = gpu_run.Run(tmp_path, "cuda", quick=True, budget_s=60)

        def replayed(*_: object, problem: str | None = problem) -> dict[str, list[int]]:
            assert modes[-1] == "error"
            if problem:
                raise RuntimeError(problem)
            return {}

        monkeypatch.setattr(gpu_checks, "_tokens", replayed)
        gpu_checks._check_waits(run, "kernels", None, [], 1)  # type: ignore[arg-type]
        assert run.failed == ([f"launches that wait for nothing, kernels: {problem}"] if problem else [])
        assert modes[-1] == "default"
