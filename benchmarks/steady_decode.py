"""Scheduler iterations per second in steady decode, at 16 and 256 running requests, and the ratio of the two.

    python benchmarks/steady_decode.py

Prints counts and a ratio; nothing is asserted. The whole path is in it: loop, scheduler, modelled GPU and CPU, record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from reports.record.run_record import IterationLog
from traces import TraceRequest
from workbench.clients.messages import END_OF_SEQUENCE, ClientRequest
from workbench.instance import LoopSpec, Recipe, start
from workbench.recording.recorder import Recorder, RecordingOutbox
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams

STEPS = 6000
PROMPT_TOKENS = 40


@dataclass
class ConstantCost:
    """The cost model is not what is measured here."""

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return 0.01

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return 0.0


def iterations_per_second(running: int, loop: str) -> float:
    """Iterations a second while ``running`` requests decode ``STEPS`` tokens each, page size 1, radix cache on."""
    env = Clock()
    config = SchedulerConfig(
        kv_tokens=running * (STEPS + 100), max_context=STEPS + 100, max_running=running, conservativeness=0.1
    )
    script = np.arange(3, STEPS + 3, dtype=np.int32)
    script[-1] = END_OF_SEQUENCE
    log = IterationLog()
    recipe = Recipe(loop=LoopSpec(loop), scheduler=config, eos_token_ids=(END_OF_SEQUENCE,))
    sampler = ScriptedSampler(lambda rid: (PROMPT_TOKENS, script), recipe.rows)
    backend = SimulatedBackend(env, ConstantCost(), HostModel(), sampler, log.append)
    inbox = SimulatedInbox(env)
    recorder = Recorder(env.now_s)
    outbox = RecordingOutbox(recorder, recipe.rows, lambda request: None)
    for i in range(running):
        prompt = np.arange(1000 * i, 1000 * i + PROMPT_TOKENS, dtype=np.int32)
        message = Generate(f"r{i}", prompt, SamplingParams(STEPS + 10))
        recorder.arrived(ClientRequest(TraceRequest(f"r{i}", 0.0, PROMPT_TOKENS, STEPS), message=message))
        inbox.put(message)
    env.run_loop(start(recipe, backend, lambda scheduler: (inbox, outbox), backend.now_s).loop)
    began = time.perf_counter()
    env.run()
    return len(log) / (time.perf_counter() - began)


def main() -> None:
    for loop in ("normal", "overlap"):
        few, many = iterations_per_second(16, loop), iterations_per_second(256, loop)
        print(f"{loop}: {few:,.0f} iterations/s at 16 running, {many:,.0f} at 256; a step costs {few / many:.2f}x")


if __name__ == "__main__":
    main()
