"""A scheduler without a loop, driven by hand, and what the tests of its traps share."""

from __future__ import annotations

import numpy as np
import pytest

from tests.world import Job, Run
from workbench.clients.messages import END_OF_SEQUENCE
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult

LOOPS = ["normal", "overlap", "pipeline"]
every_loop = pytest.mark.parametrize("loop", LOOPS)
both_batchings = pytest.mark.parametrize("batching", ["prefill-first", "mixed"])
EOS = END_OF_SEQUENCE
TOKEN = 7
"""What :func:`process` samples for everybody, unless told otherwise."""


def words(start: int, count: int) -> list[int]:
    """A prompt that shares nothing with one that starts elsewhere."""
    return list(range(start, start + count))


def scheduler(**settings: object) -> Scheduler:
    config = SchedulerConfig(**{"kv_tokens": 1000, "max_context": 500, **settings})  # type: ignore[arg-type]
    return Scheduler(config, eos_token_ids=(EOS,))


def eager(**settings: object) -> Scheduler:
    """One whose requests do not wait for what others in the batch are about to compute."""
    return scheduler(**{"share_in_batch_tokens": None, **settings})


def generate(rid: str, prompt: list[int], new: int, *, ignore_eos: bool = False, **more: object) -> Generate:
    return Generate(rid, np.array(prompt, np.int32), SamplingParams(new, ignore_eos=ignore_eos), **more)  # type: ignore[arg-type]


def process(s: Scheduler, batch: ScheduleBatch, token: int = TOKEN) -> StepResult:
    result = s.process(batch, StepOutput(np.full(len(batch.reqs), token, np.int32)))
    s.check()
    return result


def form(s: Scheduler, slot: int = 0) -> ScheduleBatch:
    batch = s.next_batch(slot)
    assert batch is not None
    s.check()
    return batch


def step(s: Scheduler, token: int = TOKEN) -> ScheduleBatch:
    batch = form(s)
    process(s, batch, token)
    return batch


def finish_all(s: Scheduler) -> list[ScheduleBatch]:
    batches = []
    while not s.idle:
        batch = s.next_batch()
        if batch is not None:
            process(s, batch)
            batches.append(batch)
    s.rest()
    return batches


def serve(s: Scheduler, *messages: Generate) -> None:
    """Let requests come and go, one after the other."""
    for message in messages:
        s.receive([message])
        finish_all(s)


def cached(s: Scheduler, tokens: list[int]) -> int:
    """Tokens of a sequence that the prefix cache, a radix tree, has."""
    tree = s.kv.cache.tree  # type: ignore[attr-defined]
    return int(tree.match(np.array(tokens, np.int32), touch=False)[1])


def next_rids(s: Scheduler) -> list[str] | None:
    """Who is in the next batch, which is left in flight; None where there is none."""
    batch = s.next_batch()
    s.check()
    return None if batch is None else rids(batch)


def rids(batch: ScheduleBatch) -> list[str]:
    return [req.rid for req in batch.reqs]


def extends(batch: ScheduleBatch) -> list[int]:
    return batch.worker.query_lens[: batch.worker.num_prefill].tolist()


def all_finished(run: Run, jobs: list[Job]) -> None:
    assert {rid: req.finish.status for rid, req in run.ended.items()} == {job.rid: "finished" for job in jobs}
    for job in jobs:
        assert run.outputs[job.rid] == job.script()[1].tolist()
        assert run.ended[job.rid].cached_tokens < len(job.prompt)
