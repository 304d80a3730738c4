"""Records of real simulations for tests of the report: short, and each made once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOPS = ("normal", "overlap", "pipeline")
SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"
_DATA = Path(os.environ.get("WORKBENCH_DATA", ROOT.parent / "shared/data"))
SHARED = _DATA / "traces" if (_DATA / "traces").is_dir() else None


def workbench(*arguments: object, cwd: Path = ROOT, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-c", "from workbench.cli.main import main; main()", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def simulate(out: Path, trace: Path = SAMPLE, *flags: object) -> Path:
    """Simulate `trace` into `out`."""
    done = workbench("simulate", trace, "--out", out, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return out
