"""One simulated run: a trace under one loop, to a run record."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import simpy

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.lockstep import LockStepBackend, LockStepGroup, LockStepInbox
from backends.simulated.sampler import ScriptedSampler
from reports.record.run_record import RunRecord
from traces import Trace, TraceRequest
from traces.requests.ahead import with_tokens
from workbench.clients.bounds import bound_of, counted
from workbench.clients.messages import END_OF_SEQUENCE
from workbench.clients.sessions import Clients
from workbench.cluster.interrupts import Interrupt, noted_interrupts
from workbench.cluster.progress import PROGRESS_EVERY_S, Progress
from workbench.cluster.resolve import SimulatedRecipe, resolve
from workbench.cluster.router import make_router
from workbench.cluster.skip_ahead import SkipAhead, can_skip
from workbench.instance import start
from workbench.recording.meta import run_meta, trace_meta
from workbench.recording.recorder import Recorder, RecordingOutbox, RequestRow
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams
from workbench.settings.idle import trace_notes
from workbench.settings.run_settings import RunSettings


class Watch(Protocol):
    """Looks at a run from the simulated moment ``due_s`` on, sets the next one, and says whether to stop there."""

    due_s: float

    def __call__(self, now_s: float, rows: Sequence[RequestRow]) -> bool: ...


class SimulatedWorld:
    """The instances of a run, their clients and the recorder, in one SimPy environment."""

    def __init__(
        self, settings: RunSettings, instance: SimulatedRecipe, trace: Trace, decisions: IO[str] | None = None
    ) -> None:
        self.env = Clock()
        self.settings = settings
        self.instance = instance
        self._outputs: dict[str, tuple[int, np.ndarray]] = {}
        """Of every request in the system: prompt length and output."""
        self._instance_of: dict[str, tuple[int, int]] = {}
        self.cost = instance.cost
        self._router = make_router(settings.router, settings.dp)
        self.recorder = Recorder(self.env.now_s, instance.scheduler.room)
        self.skips: list[SkipAhead] = []
        """Of the instances that skip steps."""
        self._group: LockStepGroup | None = None
        self._inboxes: list[SimulatedInbox] = []
        if instance.lock_step:
            self._group = group = LockStepGroup(self.env, self.cost, settings.dp)  # type: ignore[arg-type]
            self._inboxes += (LockStepInbox(self.env, group, n, self.recorder.queued) for n in range(settings.dp))
        else:
            self._inboxes += (SimulatedInbox(self.env, self.recorder.queued) for _ in range(settings.dp))
        for number, inbox in enumerate(self._inboxes):
            self._start_instance(number, inbox, decisions)
        self._tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Of requests read and not delivered, where they are made ahead."""
        self._clients = Clients(self.env, self._read(trace), self._deliver, settings.concurrency)

    def run(self, progress: Progress | None = None, watch: Watch | None = None) -> bool:
        """Simulate to the end of the trace. Returns False when interrupted from the keyboard, or stopped by ``watch``."""
        # The collector has nothing to find in a run (no cycles are made) and would walk every request again and again.
        gc.disable()
        try:
            with noted_interrupts() as interrupt:
                return self._run(progress, watch, interrupt)
        finally:
            gc.enable()

    def _run(self, progress: Progress | None, watch: Watch | None, interrupt: Interrupt) -> bool:
        step, clock = self.env.step, time.monotonic
        due = clock()
        try:
            while True:
                for _ in range(200 if watch is None else 1):
                    if interrupt.asked:
                        return False
                    step()
                if watch is not None and self.env.now >= watch.due_s and watch(self.env.now, self.recorder.rows):
                    return False
                if progress is not None and clock() >= due:
                    progress(self.env.now, self.recorder.done, len(self.recorder.iterations))
                    due = clock() + PROGRESS_EVERY_S
                if self._clients.fault is not None:
                    raise self._clients.fault
        except simpy.core.EmptySchedule:
            if self._clients.fault is not None:
                raise self._clients.fault from None
            return True

    def _start_instance(self, number: int, inbox: SimulatedInbox, decisions: IO[str] | None) -> None:
        built = self.instance
        sampler = ScriptedSampler(self._script, built.rows)
        log = self.recorder.iterations.append
        backend: SimulatedBackend
        if self._group is not None:
            backend = LockStepBackend(self.env, self._group, self.cost, built.host, sampler, log, number)
        else:
            backend = SimulatedBackend(self.env, self.cost, built.host, sampler, log, number, built.stages)
        outbox = RecordingOutbox(self.recorder, built.rows, self._ended, decisions, number)
        instance = start(built, backend, lambda scheduler: (inbox, outbox), backend.now_s)
        skip = None
        if can_skip(built.loop.name, backend) and not self.settings.exact:
            log_decodes = self.recorder.iterations.append_decodes
            self.skips.append(ahead := SkipAhead(self.env, instance.scheduler, backend, outbox, log_decodes))
            skip = ahead.skip
        self.env.run_loop(instance.loop, skip)

    def _read(self, trace: Trace) -> Iterator[TraceRequest]:
        for request, tokens in with_tokens(trace, self.instance.model.vocab, self.settings.seed):
            if tokens is not None:
                self._tokens[request.request_id] = tokens
            yield request

    def _deliver(self, request: TraceRequest, arrival_s: float) -> None:
        settings = self.settings
        made = self._tokens.pop(request.request_id, None)
        prompt, output = made or request.tokens(self.instance.model.vocab, settings.seed)
        number = self._router.choose(prompt, request.adapter or "")
        self._instance_of[request.request_id] = number, len(prompt)
        self._outputs[request.request_id] = len(prompt), output
        bound = bound_of(request, settings.max_tokens, settings.ignore_eos)
        self.recorder.arrived(request, number, arrival_s, len(prompt), bound)
        slo = request.slo_ttft_s if request.slo_ttft_s is not None else settings.slo_ttft
        params = SamplingParams(bound.tokens, settings.ignore_eos)
        namespace = request.adapter or ""
        message = Generate(request.request_id, prompt, params, arrival_s, request.priority, namespace, slo)
        self._inboxes[number].put(message)

    def _script(self, request_id: str) -> tuple[int, np.ndarray]:
        """What a request writes: the trace's output, ended by the model where the trace ends it."""
        prompt_tokens, tokens = self._outputs[request_id]
        if not self.settings.ignore_eos:
            tokens = tokens.copy()
            tokens[-1] = END_OF_SEQUENCE
        return prompt_tokens, tokens

    def _ended(self, request_id: str) -> None:
        del self._outputs[request_id]
        number, prompt_tokens = self._instance_of.pop(request_id)
        if self.settings.dp > 1:
            self._router.ended(number, prompt_tokens)
        self._clients.ended(request_id)


def simulate_loop(
    settings: RunSettings,
    loop: str,
    trace: Trace,
    *,
    trace_sha256: str,
    command: str,
    progress: Progress | None = None,
    decisions: Path | None = None,
    instance: SimulatedRecipe | None = None,
    watch: Watch | None = None,
) -> RunRecord:
    """Run a trace under one loop and return its record; ``meta['interrupted']`` tells whether it was stopped early, from
    the keyboard or by ``watch``. ``instance`` replaces what the settings imply.

    Raises ConfigError, CatalogueError, ModelDoesNotFit or TraceError.
    """
    if instance is None:
        instance = resolve(settings, loop)
    if decisions is None:
        world = SimulatedWorld(settings, instance, trace)
        finished = world.run(progress, watch)
    else:
        with decisions.open("w", encoding="utf-8") as file:
            world = SimulatedWorld(settings, instance, trace, file)
            finished = world.run(progress, watch)
    recorder = world.recorder
    if finished and recorder.by_id:
        raise AssertionError(f"{len(recorder.by_id)} requests never ended: {list(recorder.by_id)[:3]}")
    meta = run_meta(
        name=loop,
        command=command,
        trace=trace_meta(trace, trace_sha256, trace_notes(settings, recorder.rows)),
        model=instance.model.name,
        gpu=instance.gpu.name,
        gpus=instance.gpus * settings.dp,
        simulated=True,
        settings=settings,
        found={
            "loop": loop,
            "tp": instance.tp,
            "pp": instance.stages,
            "kv_tokens": instance.scheduler.kv_tokens,
            "max_context": instance.scheduler.max_context,
            "dtype": instance.weights.dtype,
        },
        ran_on=("simpy",),
        interrupted=not finished,
        totals={
            "requests": len(recorder.rows),
            "ended": recorder.done,
            "iterations": len(recorder.iterations),
            "cut": counted(recorder.cuts),
            "simulated_s": round(world.env.now, 9),
        },
        weights=instance.weights.described,
        kv_budget=instance.kv_budget,
        cost_notes=list(getattr(world.cost, "notes", ())),
        host_model={f.name: getattr(instance.host, f.name) for f in dataclasses.fields(instance.host) if f.init},
    )
    return RunRecord(
        meta,
        recorder.request_columns(),
        recorder.iterations.columns(),
        recorder.inter_token_gaps(),
        recorder.event_columns(),
    )
