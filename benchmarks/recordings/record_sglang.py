"""Record what SGLang's own scheduler decides, on CPU and without a model.

    record_sglang.py OUT.json.gz --seeds 0,1 [--cases tight,mixed] [--conservativeness 0.05]
    record_sglang.py --trace tight/16/overlap/0 [--conservativeness 0.05]

Run it in an environment of its own (record.py makes one) with the repository's root and the files of a wheel of sglang on
PYTHONPATH: 0.5.23 or 0.5.10.post1, whose own modules here say how each is driven.

What is SGLang's: the whole Scheduler with its event loops, the policy and the adder of prompts, batches and requests,
retraction and preemption, the prefix cache, the pools and allocators of rows and KV slots, the processing of results,
and the leak checks of its idle pass. All settings are a server's defaults but for the sizes of the case, the page size,
the loop and what the case asks for (sglang_steps.server_args).

What is not: the worker with the model (it samples scenarios.token), sockets and tokenizer, and when requests and aborts
come: by step, not by time. A step is a call of get_next_batch_to_run; where there is nothing to do the step jumps to
the next arrival. A forward is done when it is launched; the overlap loop takes its result one step later all the same.

A recording holds for every "case/page/loop/seed" the steps with a batch: {request id: tokens computed for it, the extend
length of a prompt and 1 of a decode}, and under "!" the ids that lost their KV since the batch before, by retraction or
preemption.

Requests say ignore_eos, and their whole output is then counted on when others are admitted: nothing is ever retracted. With
--conservativeness they do not say so (and stop by length all the same), and --schedule-conservativeness has this value.

Checked in every run: before each forward the KV slots of every row hold exactly its tokens; each request writes exactly its
output, an aborted one the start of it; in idle passes and at the end no slot and no row is lost.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.machinery
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers.utils.import_utils as transformers_imports  # noqa: E402
from sglang_steps import MODEL  # noqa: E402

from workbench.parity.scenarios import CASES  # noqa: E402

MODULES = {"0.5.23": "sglang_0_5_23", "0.5.10.post1": "sglang_0_5_10"}
"""By version of sglang: the module that drives it."""


class Unused:
    """Stands in for packages that SGLang imports and scheduling on a CPU never calls."""

    packages = ("torchvision", "sgl_kernel")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock()

        module.__getattr__ = attribute


transformers_imports.is_torchvision_available()  # It remembers that there is none, before the stand-in is there.
sys.meta_path.append(Unused())  # type: ignore[arg-type]

import sglang  # noqa: E402

if sglang.__version__ not in MODULES:
    sys.exit(f"sglang {sglang.__version__} is not one that can be recorded: {', '.join(MODULES)}")
engine: Any = importlib.import_module(MODULES[sglang.__version__])


def run(
    case: str, page: int, loop: str, seed: int, conservativeness: float | None, trace: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """One scenario, in a process that makes no other scheduler."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(MODEL))
        recorder = engine.Recorder(model, case, page, loop, seed, conservativeness, trace)
    recorder.run()
    recorder.steps.check_outputs()
    return f"{case}/{page}/{loop}/{seed}", recorder.steps.log


def run_one(what: tuple[Any, ...]) -> tuple[str, list[dict[str, Any]]]:
    return run(*what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="the recording, .json.gz")
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--cases", help="comma-separated; default: all that SGLang has")
    parser.add_argument("--conservativeness", type=float, help="requests may then stop, and it has this value")
    parser.add_argument(
        "--trace", metavar="KEY", help="run this case/page/loop/seed and print each step's state to stderr"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.trace:
        case, page, loop, seed = args.trace.split("/")
        run(case, int(page), loop, int(seed), args.conservativeness, trace=True)
        return
    if args.out is None:
        parser.error("say where the recording goes, or --trace KEY")
    cases = args.cases.split(",") if args.cases else [name for name, case in CASES.items() if "sglang" in case.engines]
    todo = [
        (case, page, loop, int(seed), args.conservativeness)
        for case in cases
        for page in (1, 16)
        for loop in ("normal", "overlap")
        for seed in args.seeds.split(",")
    ]
    recorded = f"sglang {sglang.__version__}"
    if args.conservativeness is not None:
        recorded += f", conservativeness {args.conservativeness}"
    record: dict[str, Any] = {"engine": recorded}
    # A process holds one scheduler: each run has its own.
    with multiprocessing.get_context("fork").Pool(args.processes, maxtasksperchild=1) as pool:
        for key, steps in pool.imap(run_one, todo):
            record[key] = steps
            print(
                f"{key}: {len(steps)} batches, {sum(len(step.get('!', ())) for step in steps)} lost their KV",
                flush=True,
            )
    Path(args.out).write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))


if __name__ == "__main__":
    main()
