"""What the tests of searches share: the command line, and small traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"
MAIN = [sys.executable, "-c", "from workbench.cli.main import main; main()"]


def workbench(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def changed(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command after some lines of Python, in a session of its own."""
    command = [sys.executable, "-c", f"{code}\nfrom workbench.cli.main import main\nmain()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, start_new_session=True)


def signalled(number: int, after_points: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A search that gets a signal, with all its processes, the moment it has kept so many points."""
    code = f"""
import os
from workbench.search.results import Results

add = Results.add

def add_and_signal(results, *rest):
    row = add(results, *rest)
    if len(results.rows) == {after_points}:
        os.killpg(os.getpgrp(), {int(number)})
    return row

Results.add = add_and_signal
"""
    return changed(code, *arguments)


def sweep(out: Path, *arguments: object) -> pd.DataFrame:
    """The results of a sweep of the sample's first requests."""
    done = workbench("sweep", SAMPLE, "--requests", 12, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out / "results.csv")


def line(*arguments: object) -> str:
    """The one line of a refused command. In this process: there are many of them, and they end before work begins."""
    from workbench.cli.app import app

    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def write_trace(path: Path, number: int, gap_s: float = 0.1, input_tokens: int = 200, output_tokens: int = 8) -> Path:
    rows: list[dict[str, Any]] = [
        {"arrival_s": gap_s * i, "input_length": input_tokens + 7 * (i % 11), "output_length": output_tokens + i % 5}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
