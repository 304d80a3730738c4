"""A small simulated world for tests: an instance, its loop, and requests that arrive when a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.host import FREE_HOST, HostModel
from backends.simulated.sampler import ScriptedSampler
from tests.verifier import Verifier
from traces import TraceRequest
from workbench.clients.messages import END_OF_SEQUENCE, ClientRequest
from workbench.cluster.skip_ahead import SkipAhead
from workbench.instance import LoopSpec, Recipe, start
from workbench.recording.recorder import Recorder, RecordingOutbox
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req, SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult


@dataclass
class LinearCost:
    """A step costs a constant and so much a prompt token and a decode: times a reader can add up."""

    step_s: float = 0.010
    prefill_token_s: float = 0.0001
    decode_s: float = 0.0
    link_s: float = 0.0

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return self.step_s + self.prefill_token_s * batch.prefill_tokens + self.decode_s * batch.decode_tokens

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return self.link_s


@dataclass
class Job:
    """A request of a test. ``writes`` is where the model would stop; ``bound`` is what the scheduler knows."""

    rid: str
    prompt: Sequence[int]
    writes: int
    bound: int | None = None
    arrival_s: float = 0.0
    priority: int = 0
    namespace: str = ""
    slo_ttft_s: float | None = None
    eos: bool = True
    output: Sequence[int] | None = None
    session: str = ""
    bos_tokens: int = 0

    def script(self) -> tuple[int, np.ndarray]:
        tokens = np.array(self.output or [900_000 + i for i in range(self.writes)], np.int32)
        if self.eos:
            tokens[-1] = END_OF_SEQUENCE
        return len(self.prompt), tokens

    def message(self) -> Generate:
        bound = self.bound if self.bound is not None else self.writes
        return Generate(
            self.rid,
            np.array(self.prompt, np.int32),
            SamplingParams(bound, ignore_eos=not self.eos),
            self.arrival_s,
            self.priority,
            self.namespace,
            self.slo_ttft_s,
            self.session,
            self.bos_tokens,
        )


class Rows(list):
    """The rows a backend logs."""

    def go_on(self, *own: Sequence[float]) -> None:
        last = self[-1]
        for step, (launch_s, start_s, end_s, used) in enumerate(zip(*own, strict=True), start=1):
            row = last._replace(
                iteration=last.iteration + step, context_tokens=last.context_tokens + step * last.decode_tokens
            )
            self.append(row._replace(launch_s=launch_s, start_s=start_s, end_s=end_s, kv_used_tokens=used))


@dataclass
class Run:
    """What a test looks at afterwards."""

    scheduler: Scheduler
    rows: Rows = field(default_factory=Rows)
    first_s: dict[str, float] = field(default_factory=dict)
    end_s: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, Req] = field(default_factory=dict)
    batches: list[ScheduleBatch] = field(default_factory=list)
    scheduled_s: dict[str, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    """``new_token_ratio`` whenever a request began or ended."""
    runs: list[int] = field(default_factory=list)
    """How many tokens each row that decodes got in a step, where tokens are drafted."""
    skipped_s: list[float] = field(default_factory=list)
    """When results of steps went out that were skipped."""


class _Outbox:
    def __init__(
        self,
        env: Clock,
        run: Run,
        check: bool,
        on_step: Callable[[Run, float], None] | None,
        recorder: Recorder | None = None,
    ):
        self.env, self.run, self.check, self.on_step = env, run, check, on_step
        rows = run.scheduler.kv.table.rows
        self.recording = None if recorder is None else RecordingOutbox(recorder, rows, lambda request: None)

    def scheduled(self, batch: ScheduleBatch) -> None:
        if self.recording is not None:
            self.recording.scheduled(batch)
        self.run.batches.append(batch)
        for _, rid, *_ in batch.worker.new_requests:
            self.run.scheduled_s.setdefault(rid, self.env.now)
        if self.check:
            self.run.scheduler.check()

    def send(self, result: StepResult, now: float | None = None) -> None:
        run = self.run
        now = self.env.now if now is None else now
        if self.recording is not None:
            self.recording.send(result, now)
        if result.batch is not None:
            assert result.output is not None
            silent = set(result.batch.dropped or ())
            if result.batch.worker.unsampled is not None:
                silent |= set(result.batch.worker.unsampled.tolist())
            tokens, counts = result.output.tokens.tolist(), result.output.counts
            ends = np.arange(1, len(tokens) + 1) if counts is None else counts.cumsum()
            for i, (req, end) in enumerate(zip(result.batch.reqs, ends.tolist(), strict=True)):
                given = tokens[ends[i - 1] if i else 0 : end]
                assert counts is None or bool(given) == (i not in silent)
                if i not in silent:
                    run.outputs.setdefault(req.rid, []).extend(given)
        if result.first or result.ended:
            run.ratios.append(run.scheduler.estimate.new_token_ratio)
        for req in result.first:
            assert req.rid not in run.first_s
            run.first_s[req.rid] = now
        for req in result.ended:
            assert req.rid not in run.ended, f"{req.rid} ended twice"
            run.ended[req.rid] = req
            run.end_s[req.rid] = now
        if self.check:
            run.scheduler.check()
        if self.on_step:
            self.on_step(run, now)

    def scheduled_decodes(self, newest: ScheduleBatch, kv_used_tokens: Sequence[int]) -> None:
        pass

    def send_decodes(self, batch: ScheduleBatch, moments_s: list[float]) -> None:
        self.run.skipped_s += moments_s
        if self.check:
            self.run.scheduler.check()


def simulate(
    jobs: Sequence[Job],
    loop: str = "normal",
    *,
    cost: object | None = None,
    host: HostModel = FREE_HOST,
    messages: Sequence[tuple[float, object]] = (),
    check: bool = True,
    on_step: Callable[[Run, float], None] | None = None,
    until_s: float | None = None,
    stages: int | None = None,
    loop_options: dict[str, object] | None = None,
    skip: bool = False,
    recorder: Recorder | None = None,
    **settings: object,
) -> Run:
    """Run jobs through one instance under a loop and return what happened, with all invariants checked on the way. The
    ``recorder`` is told, too."""
    env = Clock()
    config = SchedulerConfig(**{"kv_tokens": 4096, "max_context": 2048, **settings})  # type: ignore[arg-type]
    scripts = {job.rid: job.script() for job in jobs}

    def script(rid: str) -> tuple[int, np.ndarray]:
        # A session puts its tokens before a job's own.
        return scheduler.lifecycle.by_id[rid].input_len, scripts[rid][1]

    stages = stages or config.slots
    recipe = Recipe(loop=LoopSpec(loop, **(loop_options or {})), scheduler=config, eos_token_ids=(END_OF_SEQUENCE,))  # type: ignore[arg-type]
    sampler = Verifier(script, recipe.rows, config) if config.draft_tokens else ScriptedSampler(script, recipe.rows)
    rows = Rows()
    backend = SimulatedBackend(env, cost or LinearCost(), host, sampler, rows.append, stages=stages)  # type: ignore[arg-type]
    inbox = SimulatedInbox(env)
    if recorder is not None:
        recorder.now_s = env.now_s
        for job in jobs:
            trace = TraceRequest(job.rid, job.arrival_s, len(job.prompt), job.writes)
            recorder.arrived(ClientRequest(trace, message=job.message()))

    def mailboxes(scheduler: Scheduler) -> tuple[SimulatedInbox, _Outbox]:
        return inbox, _Outbox(env, Run(scheduler, rows), check, on_step, recorder)

    instance = start(recipe, backend, mailboxes, backend.now_s)
    scheduler, outbox = instance.scheduler, instance.outbox
    assert isinstance(outbox, _Outbox)
    run = outbox.run
    if isinstance(sampler, Verifier):
        run.runs = sampler.runs
    ahead = SkipAhead(env, scheduler, backend, outbox, rows).skip if skip else None
    env.run_loop(instance.loop, ahead)

    def deliver():
        todo = sorted([(job.arrival_s, job.message()) for job in jobs] + list(messages), key=lambda item: item[0])
        for at, message in todo:
            if at > env.now:
                yield env.timeout(at - env.now)
            inbox.put(message)
        yield env.timeout(0)

    env.process(deliver())
    env.run(until=until_s)
    return run
