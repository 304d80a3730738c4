"""Requests that can never be served are a warning and a number; nothing that can be served is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from workbench.cli.app import app


def written(path: Path, *lengths: int) -> Path:
    lines = [{"arrival_s": i, "input_length": length, "output_length": 4} for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def workbench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_a_run_that_serves_some_warns_and_counts_the_others(tmp_path):
    trace = written(tmp_path / "t.jsonl", 50, 5000, 60)
    ran = workbench("simulate", trace, "--kv-tokens", 1000, "--out", tmp_path / "o")
    assert ran.exit_code == 0
    assert last(ran.stderr) == (
        "warning: 1 of 3 requests can never be served under overlap: r2 with 5000 input tokens is prompt_exceeds_kv "
        "(kv_tokens 1000, max_context 1001)"
    )
    assert "Rejected" in ran.stdout and "finished 2 of 3 requests (1 rejected)" in " ".join(ran.stdout.split())
    ran = workbench("simulate", trace, "--kv-tokens", 10, "--loop", "normal,overlap", "--out", tmp_path / "none")
    assert ran.exit_code == 2
    assert "error: 3 of 3 requests can never be served under normal" in ran.stderr
    assert (tmp_path / "none" / "report.html").is_file()


@pytest.mark.parametrize(
    ("sizes", "code", "says"),
    [
        (
            "1000,8000",
            0,
            "warning: 1 of 2 points cannot serve every request; first, point 0: 1 of 3 requests can never be",
        ),
        ("1000,2000", 0, "warning: 2 of 2 points cannot serve every request"),
        ("10,20", 2, "error: no point can serve a request, 2 of 2 points were tried"),
    ],
)
def test_a_sweep_compares_points_that_serve_as_much_as_any(tmp_path, sizes, code, says):
    trace = written(tmp_path / "t.jsonl", 50, 5000, 60)
    ran = workbench("sweep", trace, "--vary", f"kv_tokens={sizes}", "--out", tmp_path / "o", "--json")
    assert ran.exit_code == code, ran.output
    assert says in ran.stderr
    found = json.loads(ran.stdout)
    assert {row["point"] for row in found["pareto"]} <= ({1} if sizes.endswith("8000") else {0, 1})
    assert bool(found["pareto"]) == (code == 0)
    page = (tmp_path / "o" / "sweep.html").read_text()
    assert ("No point could serve every request" in page) == (sizes == "1000,2000")


def test_a_plan_is_of_the_requests_that_can_be_served_and_says_so(tmp_path):
    trace = written(tmp_path / "t.jsonl", 50, 5000, 60, 70, 80)
    words = ("plan", trace, "--slo", "ttft_p99=2s", "--json")
    ran = workbench(*words, "--kv-tokens", 1000)
    assert ran.exit_code == 0, ran.output
    assert "warning: 1 of 5 requests can never be served: r2 with 5000 input tokens" in ran.stderr
    found = json.loads(ran.stdout)
    assert found["candidates"][0]["carries_target"] is True and found["candidates"][0]["requests_rejected"] == 1
    assert any(line.startswith("Left out: 1 of 5 requests can never be served") for line in found["answer"])
    ran = workbench(*words, "--vary", "kv_tokens=1000,8000")
    small = next(c for c in json.loads(ran.stdout)["candidates"] if c["settings"]["kv_tokens"] == 1000)
    assert small["status"] == "incomplete" and small["carries_target"] is False
    assert json.loads(ran.stdout)["candidates"][0]["settings"]["kv_tokens"] == 8000
    ran = workbench(*words, "--kv-tokens", 10)
    assert ran.exit_code == 2
    assert "error: 5 of 5 requests can never be served" in ran.stderr
