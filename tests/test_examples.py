"""Every example runs as its text says, as a script and by its name on a command line, and shows what it is there for."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from traces import sample_path
from workbench.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"([\d.]+)"


def run(name: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a script prints; twice, for it is the same both times."""
    said = []
    for _ in range(2):
        argv, sys.argv = sys.argv, [str(ROOT / "examples" / name), *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            sys.argv = argv
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    return said[0]


def test_the_policy_serves_short_prompts_first_and_forgets_nobody(capsys):
    found = re.findall(rf"(\w+) +mean TTFT +{NUMBER} s +worst +{NUMBER} s", run("policy.py", capsys))
    (fcfs, sjf, aged) = [(float(mean), float(worst)) for _, mean, worst in found]
    assert [name for name, *_ in found] == ["fcfs", "sjf", "ShortestAged"]
    assert sjf[0] < aged[0] < fcfs[0] and aged[1] < sjf[1]


def test_the_cost_model_leaves_out_what_the_roofline_counts(capsys):
    found = dict(re.findall(rf"(\w+) +mean gap between tokens {NUMBER} ms", run("cost_model.py", capsys)))
    assert 0.5 * float(found["roofline"]) < float(found["TwoTerms"]) < float(found["roofline"])


def test_the_loop_looks_at_its_inbox_less_often(capsys):
    said = run("loop.py", capsys)
    (normal, patient) = re.findall(rf"receiving +{NUMBER} ms +in the inbox +{NUMBER} ms", said)
    assert float(patient[0]) < float(normal[0]) / 4 and float(patient[1]) > 2 * float(normal[1])


@pytest.mark.slow
def test_the_sweep_leaves_a_table_and_a_picture(tmp_path, capsys):
    said = run("sweep_and_plot.py", capsys, str(tmp_path / "sweep.png"))
    assert len(re.findall(r"^\d+ +[\d.]+ +[\d.]+ +[\d.]+$", said, re.M)) == 3
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'sweep.png'}" in said


def commands() -> list[str]:
    return [line for path in EXAMPLES for line in re.findall(r"^    workbench (.*)$", path.read_text(), re.M)]


@pytest.mark.parametrize("command", commands())
def test_the_command_that_an_example_names_runs_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command.replace("trace.jsonl", str(sample_path())).split()
    done = CliRunner().invoke(app, [*words, "--requests", "10", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output


def test_examples_are_short_and_each_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert len(commands()) == 3
    for path in EXAMPLES:
        assert 15 <= len(path.read_text().splitlines()) <= 60
        assert f"examples/{path.name}" in readme
