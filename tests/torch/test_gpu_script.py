"""benchmarks/gpu.py: it runs where only torch and its companions are, and all of it works before a GPU is lent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
ABSENT = ("simpy", "msgspec", "starlette", "uvicorn", "zmq", "pydantic", "zstandard", "optuna")
"""What the GPU machine does not have."""


sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_checks, gpu_children, gpu_tests  # noqa: E402
from benchmarks.gpu_children import Section, run_sections  # noqa: E402
from benchmarks.gpu_run import Run  # noqa: E402


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
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
        "benchmarks.gpu_children",
        "benchmarks.gpu_run",
        "benchmarks.gpu_sections",
        "benchmarks.gpu_tests",
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
    out, packed = tmp_path / "out", tmp_path / "all.tgz"
    # Sections run in processes of their own, each of which has to do without.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    options = ("--out", str(out), "--device", "cpu", "--quick", "--pack", str(packed))
    done = run(str(SCRIPT), *options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert results["failed"] == []
    sections = {"kernel_checks", "kernels", "loops", "end_to_end", "calibration", "fidelity", "fp8", "peer"}
    assert sections | {"environment", "timing"} <= set(results)
    assert list(results["timing"]) == list(gpu.SECTIONS)
    assert all(results["environment"][name] for name in ("torch", "triton", "pyarrow", "pytest"))
    assert len(results["end_to_end"]["qwen3-14b"]["overlap"]) == 1
    assert len(results["end_to_end"]["qwen3-0.6b"]["overlap"]) == 2
    assert results["peer"]["qwen3-0.6b"]["tokens_per_s"] > 0
    assert all(len(row["seconds"]) == 1 for row in results["kernels"]["decode"])
    assert len(results["loops"]["overlap"]) == 1
    for of_shape in results["fp8"].values():
        assert len(of_shape["overlap"]) == 1 and 0.9 < of_shape["quality"]["cosine_least"] < 1
    assert {entry["what"]: entry["section"] for entry in results["skipped"]} == {
        "greedy tokens with CUDA graphs, launches that wait for nothing": "check_tokens",
        "cost of CUDA graphs": "loops",
        "prediction": "prediction",
    }
    assert any("skipped" in entry["line"] for entry in results["table"] if entry["section"] == "tests")
    # The table comes last, and names what was left out.
    assert done.stdout.splitlines()[-1].startswith("skipped: ")
    with tarfile.open(packed) as archive:
        assert {"out/kernels.json", "out/fidelity/trace-80.jsonl", "out/peer.json"} <= set(archive.getnames())

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
            record = read_record(out / "fidelity" / f"{share}-{loop}-1")
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
    run = Run(tmp_path, "cpu", False, 100.0, "loops")
    assert run.fits("short", 5)
    assert not run.fits("long", 1000)
    (entry,) = json.loads((tmp_path / "skipped.json").read_text())
    assert (entry["section"], entry["what"]) == ("loops", "long") and "1000 s" in entry["why"]


def faulty(name: str, **more: Any) -> Section:
    return Section(name, f"tests.torch.faulty_sections:{name}", 600, **more)


def test_a_section_that_raises_hangs_or_is_killed_costs_no_other_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # A hang is one whatever its limit: the shorter, the sooner the test ends.
    monkeypatch.setattr(gpu_children, "MARGIN_S", 0.0)
    monkeypatch.setattr(gpu_children, "GRACE_S", 0.5)
    out, packed = tmp_path / "out", tmp_path / "out.tgz"
    names = ("raises", "dies", "hangs", "is_deaf")
    sections = [faulty(name, most_s=0.5 if name in names[2:] else 600) for name in names]
    sections += [Section("guest", "tests.torch.faulty_sections:hangs", 600, most_s=0.5, ours=False)]
    assert not run_sections([*sections, faulty("wrong"), faulty("right")], out, "cpu", False, 4200.0, packed)
    failed = {entry["section"]: entry["what"] for entry in json.loads((out / "failed.json").read_text())}
    assert failed == {
        "raises": "raises: RuntimeError: CUDA error: an illegal memory access was encountered",
        "dies": "dies: ended by SIGKILL; see logs/dies.txt",
        "hangs": failed["hangs"],
        "is_deaf": failed["is_deaf"],
        "wrong": "a kernel: differs by 3",
    }
    assert failed["hangs"].startswith("hangs: not done after 0 s")
    assert failed["is_deaf"].startswith("is_deaf: not done after 0 s")
    (late,) = json.loads((out / "skipped.json").read_text())
    assert late["section"] == "guest" and late["why"].startswith("not done after")
    # Whatever was found before and after is there, in the folder and in the archive.
    assert json.loads((out / "half.json").read_text()) == json.loads((out / "right.json").read_text()) == {"found": 1}
    lines = [entry["line"] for entry in json.loads((out / "table.json").read_text())]
    assert lines == ["before the fault", "right is done"]
    assert list(json.loads((out / "timing.json").read_text())) == [*names, "guest", "wrong", "right"]
    assert "illegal memory access" in (out / "logs" / "raises.txt").read_text()
    with tarfile.open(packed) as archive:
        assert {"out/half.json", "out/right.json", "out/failed.json", "out/logs/hangs.txt"} <= set(archive.getnames())
    assert "illegal memory access" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_is_found_before_an_interruption_is_packed_and_the_section_ends_with_its_command(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {section.name: section for section in (faulty("right"), faulty("interrupts"), faulty("hangs"))}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setenv("FAULTY_SIGNAL", name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    number = signal.Signals[name]  # a test run in the background, or under nohup, ignores some
    before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        ended = gpu.main(["--out", "out", "--pack", "out/all.tgz", "--device", "cpu", "--quick"])
    finally:
        signal.signal(number, before)
    assert ended == status
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads((tmp_path / "out" / "half.json").read_text())["pid"], 0)
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [(entry["section"], entry["why"]) for entry in skipped] == [
        ("interrupts", "interrupted"),
        ("hangs", "interrupted"),
    ]
    with tarfile.open(tmp_path / "out" / "all.tgz") as archive:
        names = set(archive.getnames())
    assert {"out/right.json", "out/half.json", "out/skipped.json"} <= names and "out/all.tgz" not in names
    told = capsys.readouterr().out
    assert told.index("== results in") < told.index("right is done", told.index("== results in"))


def test_an_archive_that_cannot_be_written_costs_no_results_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarfile.open", full)
    out, packed = tmp_path / "out", tmp_path / "all.tgz"
    assert not run_sections([faulty("right"), faulty("wrong")], out, "cpu", False, 1200.0, packed)
    assert json.loads((out / "right.json").read_text()) == {"found": 1}
    assert capsys.readouterr().err == f"error: {packed}: No space left on device\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out), "--device", "cpu", "--quick", "--pack", str(packed)])
    assert "--pack" in capsys.readouterr().err and not list(tmp_path.glob("*.tgz"))


def test_without_torch_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--quick"]) == 2
    assert capsys.readouterr().err == "error: there is no torch here, and nothing of this goes without it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_section_that_lacks_a_package_is_one_line_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(('pyarrow', 'pytest', 'transformers')))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "out"
    sections = [gpu.SECTIONS[name] for name in ("versions", "tests", "check_tokens")]
    assert not run_sections([*sections, faulty("right")], out, "cpu", True, 1e6)
    failed = {entry["what"] for entry in json.loads((out / "failed.json").read_text())}
    lacking = {f"{name} is installed" for name in ("pyarrow", "pytest", "transformers")}
    assert lacking <= failed and len(failed) == 4
    (token_check,) = failed - lacking
    assert token_check.startswith("check_tokens: ModuleNotFoundError") and "transformers" in token_check
    assert {entry["why"] for entry in json.loads((out / "skipped.json").read_text())} == {"there is no pytest"}
    assert json.loads((out / "environment.json").read_text())["pyarrow"] is None
    assert json.loads((out / "right.json").read_text()) == {"found": 1}


def test_a_second_command_adds_to_a_folder_and_a_section_that_runs_again_replaces_its_own(tmp_path: Path) -> None:
    Run(tmp_path, "cpu", False, 9.0, "right").check("what is mended", False)
    Run(tmp_path, "cpu", False, 9.0, "loops").check("a loop", False, "is slow")
    Run(tmp_path, "cpu", False, 9.0, "fp8").skip("qwen3-14b", "no time")
    assert run_sections([faulty("right")], tmp_path, "cpu", False, 600.0)
    assert json.loads((tmp_path / "failed.json").read_text()) == [{"section": "loops", "what": "a loop: is slow"}]
    assert [entry["section"] for entry in json.loads((tmp_path / "skipped.json").read_text())] == ["fp8"]
    assert json.loads((tmp_path / "table.json").read_text()) == [{"section": "right", "line": "right is done"}]


def test_a_section_without_time_is_named_and_its_time_is_no_one_elses(tmp_path: Path) -> None:
    assert not run_sections([faulty("right"), faulty("hangs")], tmp_path, "cpu", False, 1e-6)
    entries = json.loads((tmp_path / "skipped.json").read_text())
    assert [(entry["section"], entry["why"]) for entry in entries] == [
        (name, "the time is up") for name in ("right", "hangs")
    ]


def test_the_two_halves_fit_a_lent_gpu_and_the_peer_comes_last() -> None:
    halves = [sum(section.share_s for section in part) for part in gpu.PARTS.values()]
    assert halves == [300, 360]
    assert gpu.SECTIONS["tests"].most_s == 110
    last = list(gpu.SECTIONS.values())[-1]
    assert last.name == "peer" and last.most_s == 75


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ((), list(gpu.SECTIONS)),
        (("--part", "2"), ["end_to_end", "calibration", "fidelity", "prediction", "fp8", "peer"]),
        (("--checks-only",), ["versions", "tests", "check_kernels", "check_tokens"]),
        (("--no-checks", "--part", "1"), ["versions", "kernels", "loops"]),
        (("--only", "fp8,kernels"), ["kernels", "fp8"]),
    ],
)
def test_options_choose_the_sections(
    options: tuple[str, ...], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    def noted(sections: list[Section], *_: object) -> bool:
        chosen.extend(section.name for section in sections)
        return True

    monkeypatch.setattr(gpu, "run_sections", noted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", *options]) == 0
    assert chosen == names


def test_options_that_leave_nothing_or_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--out", str(tmp_path), "--device", "cpu", "--quick"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "file").write_text("")
    for name, text in (("other/table", '[{"id": 1}]'), ("broken/failed", "[{")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_text(text)
    for options, told in (
        (["--checks-only", "--part", "2"], "leave no section"),
        (["--only", "fp8", "--part", "1"], "leave no section"),
        (["--budget-s", "0"], "--budget-s: 0"),
        (["--pack", str(tmp_path / "none" / "x.tgz")], "--pack: there is no folder"),
        (["--pack", str(tmp_path)], "is a folder"),
        (["--checks-only", "--no-checks"], "not allowed with"),
        (["--out", str(tmp_path / "file")], "File exists"),
        (["--out", str(tmp_path / "file" / "out")], "Not a directory"),
        (["--out", str(tmp_path / "other")], "other/table.json is not of this script"),
        (["--out", str(tmp_path / "broken")], "broken/failed.json: "),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.main([*base, *options])
        assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_what_pytest_tells_of_the_tests_on_the_gpu_is_noted_even_when_it_was_ended(
    several: bool, tmp_path: Path
) -> None:
    results = [("test_a", "PASSED"), ("test_b[page-1]", "FAILED"), ("test_c[x y]", "SKIPPED")]
    lines = [
        f"[gw3] [ 33%] {result} tests/kernels/test_on_gpu.py::{name} "
        if several
        else f"tests/kernels/test_on_gpu.py::{name} {result}  [ 33%]"
        for name, result in results
    ]
    run = Run(tmp_path, "cuda", False, 60.0, "tests")
    gpu_tests.note_tests(run, "\n".join(["collected 3 items", *lines, "tests/kernels/test_on_gpu.py::test_d"]), None)
    assert run.failed == ["tests/kernels/test_on_gpu.py::test_b[page-1]: failed; see logs/on_gpu.txt"]
    assert run.read("table", [])[0]["line"] == "tests on the GPU: 1 failed, 1 passed, 1 skipped"
    assert run.read("skipped", [])[0]["what"] == "further tests"
    again = Run(tmp_path, "cuda", False, 60.0, "tests")
    gpu_tests.note_tests(again, "ImportError while loading conftest", 4)
    assert again.failed == ["pytest: exit status 4; see logs/on_gpu.txt"]


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    done = run(str(SCRIPT), "--out", str(tmp_path), "--only", "kernels,lops")
    assert done.returncode == 2 and "lops" in done.stderr


def test_a_launch_that_waits_for_the_device_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = ["default"]
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    for problem in ("called a synchronizing CUDA operation", None):
        run = Run(tmp_path, "cuda", quick=True, budget_s=60, section="check_tokens")
        watched: list[dict[str, Any]] = []

        def replayed(*args: Any, problem: str | None = problem, watched: Any = watched) -> dict[str, list[int]]:
            if modes[-1] == "error":
                watched.extend(args[4] if len(args) > 4 else [{}])
                if problem:
                    raise RuntimeError(problem)
            return {}

        monkeypatch.setattr(gpu_checks, "_tokens", replayed)
        gpu_checks._check_waits(run, "kernels", None, [[1]], 1)  # type: ignore[arg-type]
        assert run.failed == ([f"launches that wait for nothing, kernels: {problem}"] if problem else [])
        assert modes[-1] == "default"
    asked = {name for one in watched for name in one}
    assert {"repetition_penalty", "logit_bias", "min_new_tokens", "logprobs", "top_p", "top_k", "min_p"} <= asked
