"""benchmarks/recordings/record.py, as far as it goes without a network: what it refuses, unpacks and asks pip for."""

from __future__ import annotations

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "recordings"


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "record.py"))


def refused(*arguments: str) -> str:
    command = [sys.executable, str(FOLDER / "record.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    return run.stderr.splitlines()[-1]


def test_a_case_that_the_engine_has_not_is_refused_before_anything_is_made(tmp_path):
    venv = tmp_path / "venv"
    said = refused("vllm", "0.33.0", "out.json.gz", "--cases", "tight,lpm", "--venv", str(venv))
    assert said.startswith("error: --cases: vllm has not what lpm asks for; it has roomy, small-budget, ")
    assert not venv.exists()
    assert refused("vllm", "0.33.0", "out.json.gz", "--seeds", "4-1").endswith("'4-1' ends before it starts")
    assert "no such case: loose" in refused("vllm", "0.33.0", "out.json.gz", "--cases", "loose")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    venv, nowhere = tmp_path / "venv", tmp_path / "none"
    said = refused("vllm", "0.33.0", str(nowhere / "out.json.gz"), "--venv", str(venv))
    assert said.endswith(f"argument OUT.json.gz: {nowhere} is no folder")
    assert refused("vllm", "0.33.0", str(tmp_path), "--venv", str(venv)).endswith(f"{tmp_path} is a folder")
    assert not venv.exists() and not nowhere.exists()


def test_a_version_that_no_script_drives_is_refused_before_anything_is_made(tmp_path):
    venv = tmp_path / "venv"
    said = refused("sglang", "0.4.10", "out.json.gz", "--venv", str(venv))
    assert said == "error: sglang 0.4.10: record_sglang.py drives 0.5.23, 0.5.10.post1"
    assert not venv.exists()


def test_a_folder_that_holds_something_else_is_never_cleared(tmp_path):
    mine = tmp_path / "venv"
    mine.mkdir()
    (mine / "pyvenv.cfg").write_text("home = elsewhere\n")
    said = refused("vllm", "0.33.0", "out.json.gz", "--venv", str(mine))
    assert said == f"error: --venv: {mine} is not empty and was not made here"
    (mine / "recordings.txt").write_text("vllm 0.19.0")
    said = refused("vllm", "0.33.0", "out.json.gz", "--venv", str(mine))
    assert said == f"error: --venv: {mine} holds vllm 0.19.0"
    assert (mine / "pyvenv.cfg").exists()


def test_an_environment_that_was_interrupted_at_any_time_is_known_as_made_here(tmp_path, monkeypatch, record):
    venv = tmp_path / "venv"

    def interrupted(command, **options):
        (venv / "half").write_text("of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            record["prepare"](venv, "vllm", "0.33.0", None)
        assert (venv / "recordings.txt").read_text() == "vllm 0.33.0, unfinished"


def test_what_is_said_of_a_recording_counts_scenarios_alone(tmp_path, record, capsys):
    write = runpy.run_path(str(FOLDER / "recording.py"))["write"]
    write(tmp_path / "out.json.gz", {"engine": "vllm 0.33.0", "recorder": "record_vllm.py", "tight/sync/0": [{}, {}]})
    assert "vllm 0.33.0, 1 scenarios, 2 steps, " in capsys.readouterr().out


def test_of_a_wheel_the_named_files_are_unpacked_and_its_own_requirements_read(tmp_path, record):
    wheel = tmp_path / "engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("engine/__init__.py", "x = 1\n")
        archive.writestr("engine/kernels.so", "machine code")
        metadata = ["Requires-Dist: PyYAML>=6", 'Requires-Dist: av; extra == "audio"', "Requires-Dist: torch==2.14.0"]
        body = "\n\nRequires-Dist: of-the-description\n"
        archive.writestr("engine-1.0.dist-info/METADATA", "Name: engine\n" + "\n".join(metadata) + body)
    assert record["unpack"](wheel, tmp_path / "files", (".py",)) == ["PyYAML>=6", "torch==2.14.0"]
    kept = [path.relative_to(tmp_path / "files").as_posix() for path in (tmp_path / "files").rglob("*.*")]
    assert kept == ["engine/__init__.py"]
    assert record["find_wheel"](tmp_path, "engine", "1.0") == wheel
    assert record["find_wheel"](tmp_path, "engine", "1.0.1") is None


def test_a_requirement_is_known_by_its_name_however_it_is_spelt(record):
    named = ["Prometheus_Client>=0.18", "prometheus-client", "PROMETHEUS.client[x]; python_version > '3'"]
    assert {record["package"](each) for each in named} == {"prometheus-client"}


def test_every_engine_is_recorded_by_a_script_that_is_there(record):
    for engine in record["ENGINES"].values():
        assert (FOLDER / engine.script).is_file()
        assert all((FOLDER / f"{module}.py").is_file() for _, module in engine.modules)
