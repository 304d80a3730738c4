"""The tests that need a GPU, as a section of benchmarks/gpu.py."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.gpu_run import Run

ROOT = Path(__file__).resolve().parent.parent


def run_tests(run: Run) -> None:
    """The tests that need a GPU, in several processes where pytest-xdist is there; as many of them as the time allows."""
    lacking = importlib.util.find_spec("pytest") is None
    if lacking:
        run.skip("tests", "there is no pytest")
        return
    several = ["-n", "8"] if run.device == "cuda" and importlib.util.find_spec("xdist") is not None else []
    if run.device == "cuda" and not several:
        run.say("there is no pytest-xdist: one test after another")
    # The tests of kernels need torch and triton alone; what all tests share needs more.
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--confcutdir=tests/kernels", *several]
    command += ["-o", "faulthandler_timeout=60"]  # where a test that hangs stands
    log = run.out / "logs" / "on_gpu.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen([*command, "tests/kernels/test_on_gpu.py"], stdout=file, stderr=file, cwd=ROOT)
        try:
            status: int | None = process.wait(None if run.quick else max(run.left(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            status = None
    note_tests(run, log.read_text(errors="replace"), status)


def note_tests(run: Run, told: str, status: int | None) -> None:
    """Note what pytest told of each test (``-v``); ``status`` None: it was ended before its end."""
    found = re.findall(
        r"(?:^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)|(PASSED|FAILED|ERROR|SKIPPED) (\S+::.+?) *$)", told, re.M
    )
    results = {name or other: result or otherwise for name, result, otherwise, other in found}
    for name, result in results.items():
        run.check(name, result in ("PASSED", "SKIPPED"), f"{result.lower()}; see logs/on_gpu.txt")
    counts = Counter(results.values())
    run.row(
        "tests on the GPU: " + (", ".join(f"{n} {result.lower()}" for result, n in sorted(counts.items())) or "none")
    )
    if status is None:
        run.skip("further tests", "the time was up; see logs/on_gpu.txt")
    elif status not in (0, 1) or (status == 1) != bool(run.failed):
        run.check("pytest", False, f"exit status {status}; see logs/on_gpu.txt")
