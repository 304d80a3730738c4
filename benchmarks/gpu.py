"""Everything about a GPU in one command: what is right, how fast it is, and records to predict.

    python benchmarks/gpu.py --out runs/gpu --pack gpu.tgz               # all of it: 11 minutes, 13 with the machine's start
    python benchmarks/gpu.py --out runs/gpu --part 1                     # checks, kernels and loops: 300 s
    python benchmarks/gpu.py --out runs/gpu --part 2                     # the rest: 360 s
    python benchmarks/gpu.py --out runs/gpu --checks-only                # what is right; --no-checks: how fast it is
    python benchmarks/gpu.py --out runs/gpu --only fp8 --budget-s 120    # some sections, in this time
    python benchmarks/gpu.py --out runs/gpu --device cpu --quick         # the code itself, on a CPU

Needs torch, triton, transformers, numpy, pandas, pyarrow, safetensors and pytest, and no network. Every section runs in a
process of its own, which ends with its time: a fault or a hang costs that section and no other. Each result is in a JSON
file under ``--out`` as soon as it is there, and in ``--pack FILE`` soon after. ``failed.json`` and ``skipped.json`` name
what went wrong and what did not fit the time; several commands may share a folder. The exit status is 1 when a section or
a check failed, 2 without a GPU. Ctrl-C, SIGTERM and SIGHUP end the section that runs; what there is by then is packed and
told, and the exit status is 130, 143 or 129.

Sections: ``versions``; ``tests``: those that only a GPU can run; ``check_kernels`` against the reference on the same device;
``check_tokens``: the greedy tokens of a small random model against those of the reference operators on the CPU, with and
without CUDA graphs, and that no launch waits for the device; ``kernels`` against the copy bandwidth and the matrix rate of
this device; ``loops``: what the CPU does in a decode step, how long the GPU idles between two, and what CUDA graphs cost;
``end_to_end``: the field's offline benchmark; ``calibration``: the points that ``workbench calibrate --from`` fits;
``fidelity``: Poisson arrivals at shares of saturation, as run records (docs/run-record.md) with the trace beside them, so
that the same can be simulated elsewhere; ``prediction``: that simulation here, where what it needs is installed; ``fp8``:
the offline benchmark with weights in FP8, and how near their logits come to the plain ones; ``peer``: transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_children import Section, pack, run_sections  # noqa: E402
from benchmarks.gpu_run import Run, check_folder  # noqa: E402

_CHECKS, _MEASURES = "benchmarks.gpu_checks", "benchmarks.gpu_sections"
PARTS = {
    "1": (
        Section("versions", f"{_MEASURES}:versions", 15),
        Section("tests", "benchmarks.gpu_tests:run_tests", 110, check=True, most_s=110),
        Section("check_kernels", f"{_CHECKS}:check_kernels", 25, check=True),
        Section("check_tokens", f"{_CHECKS}:check_tokens", 30, check=True),
        Section("kernels", f"{_MEASURES}:kernels", 60),
        Section("loops", f"{_MEASURES}:loops", 60),
    ),
    "2": (
        Section("end_to_end", f"{_MEASURES}:end_to_end", 105),
        Section("calibration", f"{_MEASURES}:calibration", 80),
        Section("fidelity", f"{_MEASURES}:fidelity", 55),
        Section("prediction", f"{_MEASURES}:prediction", 10),
        Section("fp8", f"{_MEASURES}:weights_in_fp8", 35),
        Section("peer", f"{_MEASURES}:peer", 75, most_s=75, ours=False),
    ),
}
SECTIONS = {section.name: section for part in PARTS.values() for section in part}
AS_LONG_AS_IT_TAKES_S = 1e6


def report(run: Run, chosen: list[Section]) -> None:
    """Print everything the folder has of any section, in their order."""
    run.say(f"\n== results in {run.out}")
    for name in SECTIONS:
        for line in (entry["line"] for entry in run.read("table", []) if entry["section"] == name):
            run.say(line)
    measured = run.read("timing", {})
    for name in SECTIONS:
        for entry in (entry for entry in run.read("skipped", []) if entry["section"] == name):
            told = "" if entry["what"] == name else f"{name}: "
            run.say(f"skipped: {told}{entry['what']}: {entry['why']}")
        if name not in measured and SECTIONS[name] not in chosen:
            run.say(f"skipped: {name}: not asked for")
    for entry in run.read("failed", []):
        run.say(f"FAILED: {entry['section']}: {entry['what']}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have what ends a command do what Ctrl-C does: the section that runs has a process of its own, which would go on."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    # What is ignored stays so, as SIGHUP is under nohup.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in (number for number, handler in before.items() if handler is not signal.SIG_IGN):
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure everything that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--part", choices=tuple(PARTS), help="one of the two halves of it")
    parser.add_argument("--only", help=f"sections, of {','.join(SECTIONS)}")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--checks-only", action="store_true", help="only what is right or wrong")
    checks.add_argument("--no-checks", action="store_true", help="only what is measured")
    parser.add_argument("--budget-s", type=float, help="seconds for all of it; shared out as in the whole")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="keep the folder packed in FILE (.tgz) on the way")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script, measures nothing")
    given = parser.parse_args(arguments)
    chosen = list(SECTIONS.values() if given.part is None else PARTS[given.part])
    if given.only is not None:
        names = [name for name in given.only.split(",") if name]
        for name in names:
            if name not in SECTIONS:
                parser.error(f"--only: {name!r} is not one of {', '.join(SECTIONS)}")
        chosen = [section for section in chosen if section.name in names]
    if given.checks_only or given.no_checks:
        chosen = [section for section in chosen if section.check == given.checks_only or section.name == "versions"]
    if not chosen:
        parser.error("these options leave no section")
    if given.budget_s is not None and not given.budget_s > 0:
        parser.error(f"--budget-s: {given.budget_s:g} is not more than 0")
    out, packed = given.out.resolve(), None if given.pack is None else given.pack.resolve()
    if packed is not None and not packed.parent.is_dir() and packed.parent != out:
        parser.error(f"--pack: there is no folder {packed.parent}")
    if packed is not None and packed.is_dir():
        parser.error(f"--pack: {packed} is a folder")
    if importlib.util.find_spec("torch") is None:
        print("error: there is no torch here, and nothing of this goes without it", file=sys.stderr)
        return 2
    if given.device == "cpu":
        if not given.quick:
            parser.error("--device cpu: only with --quick; a CPU tests the script and measures nothing")
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    else:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # this process stays off the device
        import torch

        if not torch.cuda.is_available():
            print("error: torch sees no GPU; --device cpu --quick runs the script without one", file=sys.stderr)
            return 2
    if problem := check_folder(out):
        parser.error(f"--out: {problem}")
    if packed is not None and (problem := pack(out, packed)):
        parser.error(f"--pack: {packed}: {problem}")
    budget_s = given.budget_s or sum(section.share_s for section in chosen)
    if given.quick:
        budget_s = AS_LONG_AS_IT_TAKES_S
    try:
        with interruptible():
            status = 0 if run_sections(chosen, out, given.device, given.quick, budget_s, packed) else 1
    except KeyboardInterrupt as interrupted:
        status = 128 + next(iter(interrupted.args), signal.SIGINT)
    report(Run(out, given.device, given.quick, 0.0, "report"), chosen)
    return status


if __name__ == "__main__":
    sys.exit(main())
