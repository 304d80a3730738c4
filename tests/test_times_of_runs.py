"""Runs of traces whose times begin late or lie far apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.record.run_record import read_record
from workbench.cli.app import app


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def workbench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_trace_that_begins_late_is_simulated_as_if_it_began_at_0(tmp_path):
    lines = [{"arrival_s": at_s, "input_length": 10, "output_length": 3} for at_s in (0, 0.5, 1.25)]
    late = [line | {"arrival_s": 140738 + line["arrival_s"]} for line in lines]
    results = []
    for name, trace in (("early", lines), ("late", late)):
        path = written(tmp_path / f"{name}.jsonl", *trace)
        ran = workbench("simulate", path, "--out", tmp_path / name)
        assert ran.exit_code == 0, ran.output
        results.append((tmp_path / name / "overlap" / "requests.csv").read_bytes())
        assert ("the first request arrives at 140738 s" in ran.output) == (name == "late")
    assert results[0] == results[1]
    notes = read_record(tmp_path / "late" / "overlap").meta["trace"]["notes"]
    assert notes == ["the first request arrives at 140738 s: times are counted from there"]


@pytest.mark.parametrize("command", ["sweep", "plan", "describe"])
def test_every_command_says_from_where_times_count(tmp_path, command):
    lines = [{"arrival_s": 140738 + at_s, "input_length": 10, "output_length": 3} for at_s in range(4)]
    trace = written(tmp_path / "t.jsonl", *lines)
    words: dict[str, list[object]] = {
        "sweep": ["sweep", trace, "--vary", "chunk=512,1024", "--out", tmp_path / "o"],
        "plan": ["plan", trace, "--slo", "ttft_p99=2s", "--out", tmp_path / "o"],
        "describe": ["trace", "describe", trace],
    }
    ran = workbench(*words[command])
    assert ran.exit_code == 0, ran.output
    assert "the first request arrives at 140738 s: times are counted from there" in " ".join(ran.output.split())


def test_a_gap_of_weeks_is_simulated_and_reported(tmp_path):
    lines = [{"arrival_s": at_s, "input_length": 10, "output_length": 3} for at_s in (0, 3456000)]
    ran = workbench(
        "simulate", written(tmp_path / "t.jsonl", *lines), "--out", tmp_path / "o", "--loop", "normal,overlap"
    )
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "o" / "report.html").stat().st_size < 2_000_000


def test_a_token_id_outside_the_vocabulary_is_one_line(tmp_path):
    lines = [
        {"arrival_s": at_s, "prompt_token_ids": [1, token], "output_length": 3} for at_s, token in ((0, 5), (1, 300000))
    ]
    trace = written(tmp_path / "t.jsonl", *lines)
    for more in ((), ("--concurrency", 1)):
        ran = workbench("simulate", trace, "--out", tmp_path / "o", *more)
        assert ran.exit_code == 2
        assert "line 2, prompt_token_ids: '300000' is outside the model's vocabulary" in ran.stderr
        assert "Traceback" not in ran.output
