"""`workbench report` and `workbench diff-config` as a user runs them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from tests.reports.simulated import SAMPLE, simulate, workbench


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("made") / "runs", SAMPLE, "--loop", "normal,overlap", "--requests", 40)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "other"
    return simulate(out, SAMPLE, "--loop", "overlap", "--requests", 40, "--chunk", 256, "--policy", "sjf")


def test_a_folder_of_runs_becomes_a_page_and_a_table_of_eighty_columns(runs, tmp_path):
    done = workbench("report", runs, "--out", tmp_path / "r.html", "--baseline", "overlap")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    words = " ".join(done.stdout.split())
    assert "against overlap" in words and "output throughput" in words.lower()
    text = (tmp_path / "r.html").read_text()
    assert 'name="generator" content="workbench"' in text and "workbench simulate" in text


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, other, tmp_path):
    done = workbench("report", runs / "overlap", other, "--out", tmp_path / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["runs"]) == ["runs/overlap", "other/overlap"]


@pytest.mark.slow
def test_the_timeline_and_figures_come_along(runs, tmp_path):
    done = workbench(
        "report",
        runs / "overlap",
        "--out",
        tmp_path / "r.html",
        "--trace-events",
        tmp_path / "t.json.gz",
        "--figures",
        "svg",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))["traceEvents"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "latency.svg",
        "over_time.svg",
        "time_use.svg",
        "timeline.svg",
    }


@pytest.mark.slow
def test_an_empty_run_a_folder_that_is_none_and_mixed_traces_are_one_line_each(runs, tmp_path):
    (tmp_path / "nothing").mkdir()
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    shutil.copytree(runs / "normal", empty)
    header = (empty / "requests.csv").read_text().splitlines()[0]
    (empty / "requests.csv").write_text(header + "\n")
    shutil.copytree(runs / "normal", mixed)
    meta = json.loads((mixed / "meta.json").read_text())
    meta["trace"]["name"] = "another"
    (mixed / "meta.json").write_text(json.dumps(meta))
    cases = {
        (tmp_path / "nothing",): "not a run",
        (tmp_path / "nowhere",): "no such folder",
        (SAMPLE,): "not a folder",
        (empty,): "an empty run",
        (runs, mixed): "different traces do not compare",
        (runs, runs / "normal"): "given twice",
        (runs, "--baseline", "x"): "no run is called x",
        (runs, "--figures", "gif"): "choose png, svg or pdf",
    }
    for arguments, says in cases.items():
        done = workbench("report", *arguments, "--out", tmp_path / "r.html")
        assert done.returncode == 2, arguments
        assert says in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        assert not (tmp_path / "r.html").exists()
    done = workbench("report", runs / "overlap", mixed, "--mixed-traces", "--out", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert "These runs served different traces" in done.stdout.replace("\n", " ")
    assert "These runs served different traces" in (tmp_path / "r.html").read_text()


def test_diff_config_shows_what_differs_and_nothing_else(runs, other):
    done = workbench("diff-config", runs / "overlap", other / "overlap")
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["runs/overlap", "other/overlap"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["settings.chunk"] == ["8192", "256"] and rows["settings.policy"] == ["fcfs", "sjf"]
    assert set(rows) == {
        "settings.chunk",
        "settings.policy",
        "settings.kv_tokens",
    }  # a smaller chunk leaves room for KV
    same = workbench("diff-config", runs / "overlap", runs / "overlap")
    assert same.stdout.strip() == "no setting differs"
    wrong = workbench("diff-config", runs / "overlap", runs)
    assert wrong.returncode == 2 and "not a run" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_help_of_the_whole_command_line_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; import workbench.cli.app;"
        "print([m for m in ('numpy', 'pandas', 'pyarrow', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
