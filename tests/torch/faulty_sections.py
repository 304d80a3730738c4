"""Sections for benchmarks/gpu.py that do what a GPU can do to real ones. No test themselves."""

from __future__ import annotations

import faulthandler
import os
import signal
import time

from benchmarks.gpu_run import Run


def right(run: Run) -> None:
    run.write(run.section, {"found": 1})
    run.row(f"{run.section} is done")


def wrong(run: Run) -> None:
    run.check("a kernel", False, "differs by 3")


def raises(run: Run) -> None:
    run.row("before the fault")
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")


def dies(run: Run) -> None:
    run.write("half", {"found": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(run: Run) -> None:
    while True:
        time.sleep(60)


def is_deaf(run: Run) -> None:
    """Hang where not even faulthandler ends it."""
    faulthandler.cancel_dump_traceback_later()
    hangs(run)


def interrupts(run: Run) -> None:
    """Have the command ended by the signal that the environment names, and go on as if it did not matter."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run.write("half", {"pid": os.getpid()})
    os.kill(os.getppid(), signal.Signals[os.environ["FAULTY_SIGNAL"]])
    hangs(run)
