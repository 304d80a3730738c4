"""Record what SGLang's own scheduler decides, on CPU and without a model: ``record.py sglang VERSION OUT.json.gz``.

Runs in an environment that holds the files of SGLang's wheel (0.5.23's tree in Rust among them, hence Python 3.11 there), a
torch, and light dependencies; record.py makes it. $MODEL is a folder with the config.json of a small Llama.

Real: the whole Scheduler with its event loops, the policy and the adder of prompts, batches and requests, retraction and
preemption, the prefix cache, the pools and allocators of rows and KV slots, the processing of results, and the leak checks
of its idle pass. All settings are a server's defaults but for the sizes of the case, the page size, the loop and what the
case asks for: sglang_steps.server_args.

Not: the worker with the model (it samples scenarios.token), sockets and tokenizer, and when requests and aborts come: by
step, not by time. A step is a call of get_next_batch_to_run; where there is nothing to do the step jumps to the next
arrival. A forward is done when it is launched; the overlap loop takes its result one step later all the same.

A recording holds for every "case/page/loop/seed" the steps with a batch: {request id: tokens computed for it, the extend
length of a prompt and 1 of a decode}, and under "!" the ids that lost their KV since the batch before, by retraction or
preemption.

Requests say ignore_eos. 0.5.23 then counts on their whole output when it admits others, and retracts nothing. With
--conservativeness they do not say so (and stop by length all the same), and --schedule-conservativeness has this value.

Checked in every run: before each forward the KV slots of every row hold exactly its tokens; each request writes exactly its
output, an aborted one the start of it; in idle passes and at the end no slot and no row is lost.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import logging
import multiprocessing
import os
import sys
import warnings
from typing import Any
from unittest.mock import MagicMock

os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers.utils.import_utils as transformers_imports  # noqa: E402
from record import ENGINES  # noqa: E402
from recording import add_arguments, chosen_cases, write  # noqa: E402


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

engine: Any = importlib.import_module(dict(ENGINES["sglang"].modules)[sglang.__version__])


def run(what: tuple[str, int, str, int, float | None, bool]) -> tuple[str, list[dict[str, Any]]]:
    """One scenario, in a process that makes no other scheduler: case, page, loop, seed, conservativeness, trace."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    recorder = engine.Recorder(os.environ["MODEL"], *what)
    recorder.run()
    recorder.steps.check_outputs()
    return "/".join(map(str, what[:4])), recorder.steps.log


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the decisions of SGLang's own scheduler.")
    add_arguments(parser)
    parser.add_argument("--conservativeness", type=float, help="requests may then stop, and it has this value")
    parser.add_argument("--trace", action="store_true", help="print the state before each step's choice to stderr")
    parser.add_argument("--only", default="", metavar="PART", help="of the scenarios whose key has this in it")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many run at a time")
    asked = parser.parse_args()
    cases = chosen_cases("sglang", asked.cases)
    if left_out := [case for case in cases if case in engine.NOT_RECORDED]:
        print(f"not recorded, {engine.__name__}.py says why: {', '.join(left_out)}")
        cases = [case for case in cases if case not in left_out]
    todo = [
        (case, page, loop, seed, asked.conservativeness, asked.trace)
        for case in cases
        for page in (1, 16)
        for loop in ("normal", "overlap")
        for seed in asked.seeds
        if asked.only in f"{case}/{page}/{loop}/{seed}"
    ]
    recorded = f"sglang {sglang.__version__}"
    if asked.conservativeness is not None:
        recorded += f", conservativeness {asked.conservativeness}"
    record: dict[str, Any] = {"engine": recorded}
    # A process holds one scheduler: each run has its own.
    with multiprocessing.get_context("fork").Pool(asked.processes, maxtasksperchild=1) as pool:
        for key, steps in pool.imap(run, todo):
            record[key] = steps
            print(f"{key}: {len(steps)} batches, {sum(len(step.get('!', ())) for step in steps)} lost their KV")
    write(asked.out, record)


if __name__ == "__main__":
    main()
