"""Sections of benchmarks/gpu.py, each in a process of its own, with an end to its time.

A CUDA fault stays with the process it happened in, and a kernel that hangs never returns: in one process either would
cost everything after it. A child that is over its time says where each of its threads stands (faulthandler) and ends; one
that cannot even do that is killed with all it started. What a section has found by then is in the folder.

    python benchmarks/gpu_children.py MODULE:FUNCTION --section NAME --out FOLDER --device cuda --limit-s 60
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_run import Run  # noqa: E402

GRACE_S = 10.0
"""From when a child ought to have ended until it is killed."""
MARGIN_S = 3.0
"""Of a child's time, kept for its end."""
PACK_EVERY_S = 20.0
SAID_SO = 3
"""Exit status of a child that has noted why it failed."""


@dataclass(frozen=True, slots=True)
class Section:
    """A function of a :class:`Run`, and what it may take of the time."""

    name: str
    where: str
    """``module:function``."""
    share_s: float
    check: bool = False
    most_s: float = float("inf")
    """Not to be exceeded even when there is more."""
    ours: bool = True
    """Being late is a failure; of someone else's code it is only something that was not measured."""


def run_sections(
    sections: Sequence[Section], out: Path, device: str, quick: bool, budget_s: float, pack_to: Path | None = None
) -> bool:
    """Run sections in turn and return whether all of them, and every check, came out right.

    Each has its share of the budget, and what those before it have left over. ``pack_to``: keep everything in the folder
    packed in this file, after every section and while one runs. Interrupted, it ends the section that runs, names what was
    not done, packs what there is, and raises KeyboardInterrupt.
    """
    began = time.monotonic()
    scale = budget_s / sum(section.share_s for section in sections)
    until_s, right, done = 0.0, True, 0
    try:
        for section in sections:
            until_s += section.share_s * scale
            right &= _run_section(section, out, device, quick, began + until_s, pack_to)
            done += 1
    except KeyboardInterrupt:
        for section in sections[done:]:
            Run(out, device, quick, 0.0, section.name).skip(section.name, "interrupted")
        raise
    finally:
        if pack_to is not None and (problem := pack(out, pack_to)):
            right = False
            _complain(f"error: {pack_to}: {problem}")
    return right


def _run_section(section: Section, out: Path, device: str, quick: bool, until: float, pack_to: Path | None) -> bool:
    """Run one section until ``until`` of the monotonic clock at most; whether it came out right."""
    limit_s = min(until - time.monotonic(), float("inf") if quick else section.most_s)
    run = Run(out, device, quick, limit_s, section.name)
    run.begin()
    if limit_s <= MARGIN_S:
        run.skip(section.name, "the time is up")
        return not section.ours
    started = time.monotonic()
    run.say(f"-- {section.name} ({limit_s:.0f} s)" if not quick else f"-- {section.name}")
    problem, late = _child(section, run, limit_s, pack_to)
    if problem and late and not section.ours:
        run.skip(section.name, problem)
    elif problem:
        run.check(section.name, False, problem)
    run.write("timing", run.read("timing", {}) | {section.name: round(time.monotonic() - started, 3)})
    if pack_to is not None:
        pack(out, pack_to)
    return not any(entry["section"] == section.name for entry in run.read("failed", []))


def _child(section: Section, run: Run, limit_s: float, pack_to: Path | None) -> tuple[str, bool]:
    """(what went wrong and is not noted yet, or "", whether it was late)."""
    log = run.out / "logs" / f"{section.name}.txt"
    log.parent.mkdir(exist_ok=True)
    options = {"section": section.name, "out": run.out, "device": run.device, "limit-s": limit_s}
    command = [sys.executable, __file__, section.where, *(f"--{name}={value}" for name, value in options.items())]
    environment = dict(os.environ)
    if section.check:
        # What compares with full precision must not be rounded to TF32, whatever the environment says.
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    with log.open("w") as file:
        process = subprocess.Popen(
            command + ["--quick"] * run.quick, stderr=file, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            killed = not _ended(process, time.monotonic() + limit_s + GRACE_S, run.out, pack_to)
        finally:
            _kill(process)
    text = log.read_text(errors="replace")
    late = killed or "Timeout (" in text  # faulthandler's words
    if process.returncode in (0, SAID_SO) and not killed:
        if process.returncode:
            _complain(_tail(text))
        return "", False
    _complain(_tail(text))
    where = f"; see {log.relative_to(run.out)}"
    if late:
        return f"not done after {limit_s:.0f} s" + (" and had to be killed" if killed else "") + where, True
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}{where}", False
    return f"exit status {process.returncode}{where}", False


def _ended(process: subprocess.Popen[bytes], deadline: float, out: Path, pack_to: Path | None) -> bool:
    """Wait for a child until the deadline, packing on the way; whether it has ended."""
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left_s, PACK_EVERY_S))
            return True
        if pack_to is not None:
            pack(out, pack_to)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)  # one that stands in the driver may not even die


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # a lost terminal
        print(text, file=sys.stderr)


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-25:])


def pack(out: Path, file: Path) -> str:
    """Everything in a folder as one archive, whole or not at all; what went wrong, or "". What is found is in the folder
    anyway: an archive that cannot be written now is no reason to stop."""
    partial = file.with_name(f".{file.name}")
    try:
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(out.rglob("*")):
                # A running child puts one file in the place of another: what has gone meanwhile has a successor.
                if path.is_file() and not path.name.startswith(".") and path != file:
                    with contextlib.suppress(FileNotFoundError):
                        archive.add(path, Path(out.name) / path.relative_to(out))
        partial.replace(file)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return ""


def main() -> None:
    """Run one section: what a child does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("where")
    parser.add_argument("--section", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(given.limit_s, exit=True)
    run = Run(given.out, given.device, given.quick, given.limit_s - MARGIN_S, given.section)
    module, _, name = given.where.partition(":")
    status = 0
    try:
        getattr(importlib.import_module(module), name)(run)
    except Exception as error:
        traceback.print_exc()
        run.check(given.section, False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        status = SAID_SO
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: after a fault of the device the ends of libraries may hang or fail.
    os._exit(status)


if __name__ == "__main__":
    main()
