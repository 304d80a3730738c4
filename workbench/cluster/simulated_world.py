"""The world of a simulated run: the instances of a cluster, their clients and the record, on one simulated clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Protocol

import numpy as np
import simpy

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.front_end import FrontEnd
from backends.simulated.kv_layout import KVOnTheWire, kv_between
from backends.simulated.lockstep import LockStepBackend, LockStepGroup, LockStepInbox
from backends.simulated.sampler import ScriptedSampler
from traces import Trace
from workbench.clients.messages import ClientRequest, Wording
from workbench.clients.sessions import Clients
from workbench.cluster.behind_front_end import FrontEndInbox, FrontEndOutbox
from workbench.cluster.cluster import Cluster, Mailbox
from workbench.cluster.fleet import Fleet, FleetPool
from workbench.cluster.interrupts import Interrupt, noted_interrupts
from workbench.cluster.kv_wires import SimulatedWires
from workbench.cluster.pairs import Pairs, Side
from workbench.cluster.pools import SimulatedPool
from workbench.cluster.progress import PROGRESS_EVERY_S, Progress
from workbench.cluster.resolve import SimulatedRecipe
from workbench.cluster.router import make_router
from workbench.cluster.skip_ahead import SkipAhead, can_skip
from workbench.instance import Instance, start
from workbench.recording.halves import DecodeOutbox, HalfNotes, PrefillOutbox
from workbench.recording.recorder import Recorder, RecordingOutbox, RequestRow
from workbench.scheduler.config import Role
from workbench.settings.run_settings import RunSettings

_NOTHING = np.zeros(1, np.int32)


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
        self._notes = HalfNotes(self.recorder)
        self._inboxes: list[SimulatedInbox] = []
        self._doors: list[Mailbox] = []
        """The inboxes as clients see them: with what is before them."""
        self._wires = SimulatedWires(self.env, self._inboxes, self._notes)
        self._pool_of = [pool for pool in pools for _ in range(pool.count)]
        """By number of the instance."""
        self._pairs: Pairs | None = None
        if settings.disaggregated:
            self._pairs = self._make_pairs(settings)
        router = make_router(settings.router, len(self._pool_of), self.env.now_s)
        self._cluster = self._pairs or Cluster(router, self.recorder, self._doors, self._lost)
        self._instances: dict[int, Instance] = {}
        for pool in pools:
            self._start_pool(pool)
        self.fleet: Fleet | None = None
        if settings.fail or settings.autoscale:
            self.fleet = self._make_fleet(settings, pools)
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

    def _make_pairs(self, settings: RunSettings) -> Pairs:
        of_role: dict[Role, list[int]] = {"prefill": [], "decode": []}
        for number, pool in enumerate(self._pool_of):
            of_role[pool.recipe.role].append(number)
        prefill, decode = of_role["prefill"], of_role["decode"]
        of_decode = settings.decode_router or settings.router
        return Pairs(
            Side(prefill, make_router(settings.router, len(prefill), self.env.now_s)),
            Side(decode, make_router(of_decode, len(decode), self.env.now_s)),
            self.recorder,
            self._doors,
            self._lost,
        )

    def _make_fleet(self, settings: RunSettings, pools: Sequence[SimulatedPool]) -> Fleet:
        members = [
            FleetPool(
                pool.name,
                pool.recipe.role,
                pool.numbers,
                pool.begins or pool.count,
                settings.slo_tpot if pool.recipe.role == "decode" else settings.slo_ttft,
                pool.scaling,
            )
            for pool in pools
        ]
        if self._pairs is not None:
            self._pairs.comes_back = any(pool.recipe.scheduler.decode_retraction == "prefill" for pool in pools)
        return Fleet(self.env, members, settings.failures, self._cluster, self, self.recorder)

    # -- instances that come and go (Machines) -----------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Start an instance that was ended, with nothing in its memory."""
        self._wires.mend(number)
        pool = self._pool_of[number]
        inbox, front_end = self._mailboxes(pool)
        self._inboxes[number], self._doors[number] = inbox, self._door(inbox, front_end)
        step = self._instances[number].scheduler.assembly.step
        self._start_instance(pool, number, inbox, None, front_end)
        self._instances[number].scheduler.assembly.step = step  # forward passes of an instance are counted on

    def end(self, number: int) -> Callable[[str], int]:
        """End an instance, whatever it is at; returns what says how much an open request had written there."""
        instance = self._instances[number]
        instance.loop.close()
        if instance.recipe.role != "both":
            self._wires.cut(number)
        return instance.scheduler.lifecycle.written

    def waiting(self, number: int) -> int:
        """Count the requests that wait on an instance, in its inbox or its queues."""
        queue = self._instances[number].scheduler.queue
        return len(queue) + queue.elsewhere + self._inboxes[number].waiting

    def kv_share(self, number: int) -> float:
        """The share of its KV that requests hold."""
        scheduler = self._instances[number].scheduler
        return scheduler.kv.used_tokens / max(scheduler.capacity.kv_tokens, 1)

    def _start_pool(self, pool: SimulatedPool) -> None:
        """Start the instances of a pool."""
        recipe = pool.recipe
        group = None
        if recipe.lock_step:
            group = LockStepGroup(self.env, recipe.cost, pool.count)  # type: ignore[arg-type]
        for rank in range(pool.count):
            inbox, front_end = self._mailboxes(pool)
            if group is not None:
                inbox = LockStepInbox(self.env, group, rank, self._on_drain(recipe))
            self._inboxes.append(inbox)
            self._doors.append(self._door(inbox, front_end))
            self._start_instance(pool, pool.first + rank, inbox, group, front_end)

    def _mailboxes(self, pool: SimulatedPool) -> tuple[SimulatedInbox, FrontEnd | None]:
        """An inbox for an instance of a pool, and what stands before it."""
        front_end = pool.recipe.front_end
        inbox = SimulatedInbox(self.env, self._on_drain(pool.recipe))
        return inbox, FrontEnd(front_end.model) if front_end is not None else None

    def _door(self, inbox: SimulatedInbox, front_end: FrontEnd | None) -> Mailbox:
        """An inbox as clients see it."""
        return inbox if front_end is None else FrontEndInbox(self.env, front_end, inbox)

    def _on_drain(self, recipe: SimulatedRecipe) -> Callable[[list[object]], None] | None:
        return {"both": self.recorder.queued, "prefill": self._notes.prefill_drained, "decode": None}[recipe.role]

    def _start_instance(
        self,
        pool: SimulatedPool,
        number: int,
        inbox: SimulatedInbox,
        group: LockStepGroup | None,
        front_end: FrontEnd | None,
    ) -> None:
        recipe = pool.recipe
        sampler = ScriptedSampler(self._script, recipe.rows)
        log = self.recorder.iterations.append
        backend: SimulatedBackend
        if group is not None:
            rank = number - pool.first
            backend = LockStepBackend(
                self.env, group, recipe.cost, recipe.host, sampler, log, rank, number, recipe.copies()
            )
        else:
            backend = SimulatedBackend(
                self.env, recipe.cost, recipe.host, sampler, log, number, recipe.stages, recipe.copies()
            )
        outbox, wire = self._outbox(recipe, number, front_end), None
        if recipe.role != "both":
            page = recipe.scheduler.page_size
            wire = self._wires.wire(number, recipe.port, page, partial(self._kv_between, number), backend.now_s)
        instance = start(recipe, backend, lambda scheduler: (inbox, outbox), backend.now_s, wire)
        self._instances[number] = instance
        skip = None
        if can_skip(recipe, backend) and not self._exact:
            assert isinstance(outbox, RecordingOutbox)
            ahead = SkipAhead(self.env, instance.scheduler, backend, outbox, self.recorder.iterations)
            self.skips.append(ahead)
            skip = ahead.skip
        self.env.run_loop(instance.loop, skip)

    def _outbox(
        self, recipe: SimulatedRecipe, number: int, front_end: FrontEnd | None
    ) -> RecordingOutbox | PrefillOutbox:
        if front_end is not None:
            told = self._ended, self._decisions, number, recipe.scheduler.room
            return FrontEndOutbox(self.env, front_end, self.recorder, recipe.rows, *told)
        if recipe.role == "prefill":
            assert self._pairs is not None
            return PrefillOutbox(self.recorder, self._notes, self._pairs.prefilled, self._decisions, number)
        kind = RecordingOutbox if recipe.role == "both" else DecodeOutbox
        outbox = kind(self.recorder, recipe.rows, self._ended, self._decisions, number, recipe.scheduler.room)
        if self._cluster.wants_answers:
            outbox.on_first = self._cluster.answered
        if isinstance(outbox, DecodeOutbox):
            assert self._pairs is not None
            outbox.retries = self._pairs.retries
        return outbox

    def _kv_between(self, source: int, target: int) -> KVOnTheWire:
        """What a request's KV is on its way between two instances."""
        one, other = self._pool_of[source].recipe, self._pool_of[target].recipe
        return kv_between(one.model, one.kv_dtype, other.tp, one.keeps_windows)

    def _deliver(self, request: ClientRequest, arrival_s: float) -> None:
        self._wording.make_tokens(request)
        self._wording.message(request, arrival_s)
        self._cluster.send(request)

    def _script(self, request_id: str) -> tuple[int, np.ndarray]:
        """Prompt length and output of a request that is under way."""
        row = self.recorder.by_id.get(request_id)
        if row is None:
            return 0, _NOTHING  # it has ended on its other instance, and this one does not know yet
        request = row.request
        assert request is not None and request.message is not None
        return len(request.message.prompt), self._wording.script(request)

    def _ended(self, request: ClientRequest) -> None:
        self._cluster.ended(request)
        self._lost(request)

    def _lost(self, request: ClientRequest) -> None:
        """A request has ended, and no instance has it any more."""
        if self.fleet is not None:
            self.fleet.ended()
        self._clients.ended(request)
