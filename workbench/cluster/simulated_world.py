"""The world of a simulated run: the instances of a cluster, their clients and the record, on one simulated clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import IO, Protocol

import numpy as np
import simpy

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.lockstep import LockStepBackend, LockStepGroup, LockStepInbox
from backends.simulated.sampler import ScriptedSampler
from traces import Trace
from workbench.clients.messages import ClientRequest, Wording
from workbench.clients.sessions import Clients
from workbench.cluster.cluster import Cluster
from workbench.cluster.interrupts import Interrupt, noted_interrupts
from workbench.cluster.pools import SimulatedPool
from workbench.cluster.progress import PROGRESS_EVERY_S, Progress
from workbench.cluster.router import make_router
from workbench.cluster.skip_ahead import SkipAhead, can_skip
from workbench.instance import start
from workbench.recording.recorder import Recorder, RecordingOutbox, RequestRow
from workbench.settings.run_settings import RunSettings


class Watch(Protocol):
    """Looks at a run from the simulated moment ``due_s`` on, sets the next one, and says whether to stop there."""

    due_s: float

    def __call__(self, now_s: float, rows: Sequence[RequestRow]) -> bool: ...


class SimulatedWorld:
    """A cluster of modelled instances, its clients and the recorder, in one SimPy environment."""

    def __init__(
        self, settings: RunSettings, pools: Sequence[SimulatedPool], trace: Trace, decisions: IO[str] | None = None
    ) -> None:
        self.env = Clock()
        self.recorder = Recorder(self.env.now_s)
        self.skips: list[SkipAhead] = []
        """Of the instances that skip steps."""
        self._exact = settings.exact
        self._decisions = decisions
        self._wording = Wording(
            pools[0].recipe.model.vocab, settings.seed, settings.max_tokens, settings.ignore_eos, settings.slo_ttft
        )
        inboxes = [inbox for pool in pools for inbox in self._start_pool(pool)]
        self._cluster = Cluster(make_router(settings.router, len(inboxes)), self.recorder, [*inboxes])
        self._clients = Clients(self.env, self._wording.read(trace), self._deliver, settings.concurrency)

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

    def _start_pool(self, pool: SimulatedPool) -> list[SimulatedInbox]:
        """Start the instances of a pool; returns their inboxes."""
        recipe, queued = pool.recipe, self.recorder.queued
        if not recipe.lock_step:
            plain = [SimulatedInbox(self.env, queued) for _ in range(pool.count)]
            for number, inbox in enumerate(plain, start=pool.first):
                self._start_instance(pool, number, inbox, None)
            return plain
        group = LockStepGroup(self.env, recipe.cost, pool.count)  # type: ignore[arg-type]
        together = [LockStepInbox(self.env, group, rank, queued) for rank in range(pool.count)]
        for number, mate in enumerate(together, start=pool.first):
            self._start_instance(pool, number, mate, group)
        return [*together]

    def _start_instance(
        self, pool: SimulatedPool, number: int, inbox: SimulatedInbox, group: LockStepGroup | None
    ) -> None:
        recipe = pool.recipe
        sampler = ScriptedSampler(self._script, recipe.rows)
        log = self.recorder.iterations.append
        backend: SimulatedBackend
        if group is not None:
            rank = number - pool.first
            backend = LockStepBackend(self.env, group, recipe.cost, recipe.host, sampler, log, rank, number)
        else:
            backend = SimulatedBackend(self.env, recipe.cost, recipe.host, sampler, log, number, recipe.stages)
        room = recipe.scheduler.room
        outbox = RecordingOutbox(self.recorder, recipe.rows, self._ended, self._decisions, number, room)
        instance = start(recipe, backend, lambda scheduler: (inbox, outbox), backend.now_s)
        skip = None
        if can_skip(recipe.loop.name, backend) and not self._exact:
            ahead = SkipAhead(self.env, instance.scheduler, backend, outbox, self.recorder.iterations)
            self.skips.append(ahead)
            skip = ahead.skip
        self.env.run_loop(instance.loop, skip)

    def _deliver(self, request: ClientRequest, arrival_s: float) -> None:
        self._wording.make_tokens(request)
        self._wording.message(request, arrival_s)
        self._cluster.send(request)

    def _script(self, request_id: str) -> tuple[int, np.ndarray]:
        """Prompt length and output of a request that is under way."""
        request = self.recorder.by_id[request_id].request
        assert request is not None and request.message is not None
        return len(request.message.prompt), self._wording.script(request)

    def _ended(self, request: ClientRequest) -> None:
        self._cluster.ended(request)
        self._clients.ended(request)
