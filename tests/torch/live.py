"""The scheduler and a loop over a real runner, for tests: requests in, tokens out."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backends.torch.backend import TorchBackend, make_backend
from backends.torch.workers import RunnerOptions
from workbench.instance import LoopSpec, Recipe, start
from workbench.loops.drive import drive
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req, SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult


class Over(Exception):
    """Everything has ended."""


@dataclass
class LiveRun:
    """What came out."""

    outputs: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, Req] = field(default_factory=dict)
    batches: list[ScheduleBatch] = field(default_factory=list)
    logprobs: dict[str, list[tuple[float, list[float], list[int]]]] = field(default_factory=dict)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    scheduler: Scheduler | None = None


class _Inbox:
    """Delivers the k-th group of messages at the k-th look."""

    def __init__(self, groups: Sequence[Sequence[object]]) -> None:
        self.groups = list(groups)

    def drain(self) -> list[object]:
        return list(self.groups.pop(0)) if self.groups else []

    def arrival(self) -> Any:
        def wait() -> None:
            if not self.groups:
                raise Over

        return wait


class _Outbox:
    def __init__(self, run: LiveRun) -> None:
        self.run = run

    def scheduled(self, batch: ScheduleBatch) -> None:
        self.run.batches.append(batch)

    def send(self, result: StepResult) -> None:
        run = self.run
        if result.batch is not None and result.output is not None:
            silent = set(result.batch.dropped or ())
            if result.batch.worker.unsampled is not None:
                silent |= set(result.batch.worker.unsampled.tolist())
            for i, req in enumerate(result.batch.reqs):
                if i in silent:
                    continue
                run.outputs.setdefault(req.rid, []).append(int(result.output.tokens[i]))
                if result.output.logprobs is not None and req.params.logprobs is not None:
                    sampled, top, ids = result.output.logprobs
                    run.logprobs.setdefault(req.rid, []).append((float(sampled[i]), top[i].tolist(), ids[i].tolist()))
        for req in result.ended:
            assert req.rid not in run.ended, f"{req.rid} ended twice"
            run.ended[req.rid] = req
        if run.scheduler is not None:
            run.scheduler.check()


def greedy(new_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(new_tokens, **{"ignore_eos": True, "temperature": 0.0, **more})


def serve(backend: TorchBackend, groups: Sequence[Sequence[object]], loop: str = "normal", **settings: Any) -> LiveRun:
    """Run messages, delivered a group a step, to the end. The scheduler's invariants are checked after every step."""
    config = SchedulerConfig(**{"kv_tokens": backend.kv_tokens, "max_context": backend.max_context, **settings})
    run = LiveRun()
    recipe = Recipe(loop=LoopSpec(loop), scheduler=config, eos_token_ids=backend.eos_token_ids)
    instance = start(recipe, backend, lambda scheduler: (_Inbox(groups), _Outbox(run)))
    run.scheduler = instance.scheduler
    backend.log_to(run.rows.append)
    with contextlib.suppress(Over):
        drive(instance.loop)
    return run


def messages(prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Generate]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    return [Generate(f"r{i}", np.array(p, np.int32), q) for i, (p, q) in enumerate(zip(prompts, each, strict=True))]


def backend_of(model: str, **options: Any) -> TorchBackend:
    """A backend on the CPU with the operators in plain torch."""
    defaults: dict[str, Any] = {"rows": 8, "kv_tokens": 512, "page_size": 1, "max_context": 200}
    return make_backend(RunnerOptions(model, **{**defaults, **options}), lambda row: None)


def spans(trace: Path) -> list[str]:
    """The batches in the trace of a profile, in order. Operators must be in it, too."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event.get("ph") == "X"]
    assert "aten::linear" in names
    return [name for name in names if name.startswith("step ")]
