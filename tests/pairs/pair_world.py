"""A small simulated world for tests of pairs: instances that prefill and instances that decode, and KV that is looked at.

Beside what a real run does, every instance has memory: the tokens whose KV was computed into each page. What goes over the
wire, or to the host's memory and back, is copied from page to page, and whoever attends looks at what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.copies import CopyEngine
from backends.simulated.host import FREE_HOST, HostModel
from backends.simulated.kv_layout import KVOnTheWire
from backends.simulated.kv_network import Port
from backends.simulated.sampler import ScriptedSampler
from tests.verifier import Verifier
from tests.world import Job, LinearCost, Rows
from traces import TraceRequest
from workbench.clients.messages import END_OF_SEQUENCE, ClientRequest
from workbench.cluster.kv_wires import SimulatedWire, SimulatedWires
from workbench.cluster.pairs import Pairs, Side
from workbench.cluster.router import Router
from workbench.cluster.skip_ahead import SkipAhead
from workbench.instance import LoopSpec, Recipe, start
from workbench.recording.halves import DecodeOutbox, HalfNotes, PrefillOutbox
from workbench.recording.recorder import Recorder, RequestRow
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler
from workbench.scheduler.disaggregated.letters import (
    Letter,
    Order,
    PagesSetAside,
    SendPages,
    StopSending,
    TransferFailed,
)
from workbench.scheduler.disaggregated.prefill_scheduler import PrefillScheduler
from workbench.scheduler.messages import Abort
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult

TOKEN_BYTES = 1000.0
"""Of KV."""


@dataclass
class Half:
    """One instance."""

    number: int
    scheduler: Scheduler
    loop: Generator[object, None, None]
    memory: Memory | None
    rows: Rows = field(default_factory=Rows)
    batches: list[ScheduleBatch] = field(default_factory=list)
    ended: list[Req] = field(default_factory=list)


class Memory(Verifier):
    """What the KV pool of one instance holds, and the host's memory beside it."""

    def __init__(self, script: Callable[[str], tuple[int, np.ndarray]], config: SchedulerConfig) -> None:
        super().__init__(script, config.rows, config)
        self.host: dict[tuple[str, int], np.ndarray] = {}
        """Pages that were saved, by request and place."""

    @property
    def pages(self) -> np.ndarray:
        return self._kv

    def sample(self, batch: ModelWorkerBatch, steps: int = 1) -> StepOutput:
        assert steps == 1
        for direction, pages, name, first in batch.kv_copies:
            if direction == "forget":
                self.host = {at: page for at, page in self.host.items() if at[0] != name}
            for place, page in enumerate(pages.tolist(), start=first):
                if direction == "save":
                    self.host[name, place] = self._kv[page].copy()
                else:
                    self._kv[page] = self.host[name, place]
            if direction == "load":  # the last of its pages were among them, and those before are in the cache
                self.host = {at: page for at, page in self.host.items() if at[0] != name}
        size = self._page_size
        for new in batch.new_requests:
            self._ids[new.row], self._said[new.row] = new.request_id, new.tokens.astype(np.int64)
            self._lens[new.row] = len(new.tokens) - 1  # as far as it decodes
        for row, first_page, pages in batch.page_writes:
            self._pages[row, first_page : first_page + len(pages)] = pages
        if batch.decode_page_rows is not None:
            lens = dict(zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True))
            places = np.array([(lens[row] - 1) // size for row in batch.decode_page_rows.tolist()], int)
            self._pages[batch.decode_page_rows, places] = batch.decode_pages
        silent = set() if batch.unsampled is None else set(batch.unsampled.tolist())
        tokens = []
        for i, row in enumerate(batch.rows.tolist()):
            query, end = int(batch.query_lens[i]), int(batch.seq_lens[i])
            said = self._said[row]
            self._write(row, end - query, said[end - query : end])
            self._lens[row] = end
            self._look(row)
            given = [] if i in silent else self._next_at(row, end)
            if i >= batch.num_prefill or given:
                self._said[row] = np.concatenate((said[:end], given)).astype(np.int64)
            tokens += given or [0]
        return StepOutput(np.array(tokens, np.int32))

    def _next_at(self, row: int, place: int) -> list[int]:
        return [int(self._flat[min(self._starts[row] + place, len(self._flat) - 1)])]


class _CheckedWire(SimulatedWire):
    """Copies what is sent, and looks at where it goes."""

    world: PairWorld

    def post(self, orders: Sequence[Order]) -> None:
        if any(isinstance(order, Letter) and isinstance(order.message, PagesSetAside) for order in orders):
            self._look_at_reserves()
        for order in orders:
            sender = self.world.halves[self._instance].scheduler
            if isinstance(order, StopSending) and sender.lifecycle.by_id:
                rooms = {req.pair.room for req in sender.lifecycle.by_id.values() if req.pair is not None}
                if order.room in rooms:  # it has lost its KV: all of it is computed and sent again
                    self.world.got.pop(order.room, None)
            if isinstance(order, SendPages):
                assert not set(order.pages.tolist()) & _to_be_computed(sender), "a page is sent before it is computed"
        super().post(orders)

    def _look_at_reserves(self) -> None:
        """Pages have been set aside, and maybe a step formed since: what everybody is promised has to be there."""
        scheduler = self.world.halves[self._instance].scheduler
        assert isinstance(scheduler, DecodeScheduler)
        running, aside = scheduler.slots[0].running.count, len(scheduler.transfer) + len(scheduler.arrived)
        step = running * scheduler.config.page_size
        left = scheduler.kv.available_pages * scheduler.config.page_size + step
        assert running + aside == 1 or left >= scheduler.config.reserved_decode_tokens * (running + aside)

    def _left(self, order: SendPages) -> None:
        memory = self.world.halves[self._instance].memory
        assert memory is not None
        self.world.on_the_way[id(order)] = memory.pages[order.pages].copy()
        super()._left(order)

    def _arrived(self, order: SendPages) -> None:
        world = self.world
        target = world.halves[order.to]
        receiver = target.scheduler
        assert isinstance(receiver, DecodeScheduler) and target.memory is not None
        req = receiver.transfer.get(order.room) or receiver.draining.get(order.room)
        assert req is not None, "KV comes for a request that has no pages for it"
        own = receiver.kv.table.pages(req.row, 0, receiver.kv.pages_for(req.kv_len)).tolist()
        assert set(order.target_pages.tolist()) <= set(own[req.shared_pages :]), "a page is written that is not its own"
        got = world.got.setdefault(order.room, [])
        assert not set(got) & set(order.target_pages.tolist()), "a page is sent twice"
        got += order.target_pages.tolist()
        target.memory.pages[order.target_pages] = world.on_the_way.pop(id(order))
        if order.last:
            assert got == own[req.shared_pages :], "pages are missing"
            size = receiver.config.page_size
            held = target.memory.pages[np.array(own)].reshape(-1)[: req.kv_len]
            assert held.tolist() == req.tokens[: req.kv_len].tolist(), f"{req.rid} got KV that is not its own, {size}"
        world.sent_bytes[order.room] = world.sent_bytes.get(order.room, 0.0) + len(order.pages)
        super()._arrived(order)


def _to_be_computed(scheduler: Scheduler) -> set[int]:
    """Pages that prompts in flight are computed into."""
    size = scheduler.config.page_size
    found: set[int] = set()
    for batch in scheduler.flights:
        written = {
            (row, first + i): page for row, first, pages in batch.worker.page_writes for i, page in enumerate(pages)
        }
        for prompt, row in zip(batch.prefill, batch.worker.rows.tolist(), strict=False):
            places = range(-(-prompt.start // size), -(-prompt.end // size))
            found.update(int(written[row, place]) for place in places if (row, place) in written)
    return found


@dataclass
class Kinds:
    """Instances of one role: how many, under which loop, on what, and with what settings."""

    count: int = 1
    loop: str = "normal"
    cost: object = field(default_factory=LinearCost)
    host: HostModel = FREE_HOST
    stages: int = 1
    settings: dict[str, object] = field(default_factory=dict)


class PairWorld:
    """Runs jobs on instances of both roles, with all invariants checked on the way."""

    def __init__(
        self,
        jobs: Sequence[Job],
        prefill: Kinds | None = None,
        decode: Kinds | None = None,
        *,
        link_bytes_s: float = inf,
        latency_s: float = 0.0,
        skip: bool | None = None,
        **settings: object,
    ) -> None:
        """``settings`` are of both roles. ``skip``: whether decode instances skip decided steps; where that is said, there
        is no memory that is looked at."""
        self.clock = Clock()
        self.jobs = {job.rid: job for job in jobs}
        self.recorder = Recorder(self.clock.now_s)
        self.notes = HalfNotes(self.recorder)
        self.inboxes: list[SimulatedInbox] = []
        self.wires = SimulatedWires(self.clock, self.inboxes, self.notes)
        self.halves: list[Half] = []
        self.got: dict[tuple[int, int], list[int]] = {}
        """By room, the pages that have been written, in their order."""
        self.on_the_way: dict[int, np.ndarray] = {}
        """What the pages of orders held when they were sent."""
        self.sent_bytes: dict[tuple[int, int], float] = {}
        self.outputs: dict[str, list[int]] = {}
        self.port = Port(link_bytes_s, latency_s)
        self.skip = skip
        self._requests: dict[str, ClientRequest] = {}
        prefill, decode = prefill or Kinds(), decode or Kinds()
        numbers = list(range(prefill.count + decode.count))
        first, others = numbers[: prefill.count], numbers[prefill.count :]
        self.pairs = Pairs(
            Side(first, Router("round_robin", len(first))),
            Side(others, Router("round_robin", len(others))),
            self.recorder,
            self.inboxes,
            lambda request: None,
        )
        for number in numbers:
            kinds, role = (prefill, "prefill") if number in first else (decode, "decode")
            self._start(number, kinds, role, settings)
        self.prefill = [half for half in self.halves if half.number in first]
        self.decode = [half for half in self.halves if half.number in others]

    def _start(self, number: int, kinds: Kinds, role: str, settings: dict[str, object]) -> None:
        config = SchedulerConfig(
            **{"kv_tokens": 4096, "max_context": 2048, "slots": kinds.stages, **settings, **kinds.settings}  # type: ignore[arg-type]
        ).for_role(role)  # type: ignore[arg-type]
        recipe = Recipe(
            loop=LoopSpec(kinds.loop), scheduler=config, eos_token_ids=(END_OF_SEQUENCE,), stages=kinds.stages
        )
        memory = Memory(self._script, config) if self.skip is None else None
        sampler = memory or ScriptedSampler(self._script, config.rows)
        rows = Rows()
        copies = CopyEngine(config.page_size * TOKEN_BYTES, 1e6, 1e6)
        backend = SimulatedBackend(
            self.clock,
            kinds.cost,  # type: ignore[arg-type]
            kinds.host,
            sampler,
            rows.append,
            number,
            kinds.stages,
            copies,
        )
        inbox = SimulatedInbox(self.clock, self.notes.prefill_drained if role == "prefill" else None)
        self.inboxes.append(inbox)
        self.wires.network.connect(number, self.port)
        kv = KVOnTheWire(TOKEN_BYTES, (), 0.0)
        if memory is None:
            wire = self.wires.wire(number, self.port, config.page_size, lambda to: kv, backend.now_s)
        else:
            wire = _CheckedWire(self.wires, number, config.page_size, lambda to: kv, backend.now_s)
            wire.world = self
        outbox = _Watched(self, number, self._outbox(role, config, number))
        instance = start(recipe, backend, lambda scheduler: (inbox, outbox), backend.now_s, wire)
        half = Half(number, instance.scheduler, instance.loop, memory, rows)
        self.halves.append(half)
        skip = None
        if self.skip and role == "decode":
            skip = SkipAhead(self.clock, instance.scheduler, backend, outbox, rows).skip
        self.clock.run_loop(instance.loop, skip)

    def _outbox(self, role: str, config: SchedulerConfig, number: int) -> PrefillOutbox | DecodeOutbox:
        if role == "prefill":
            return PrefillOutbox(self.recorder, self.notes, self.pairs.prefilled, None, number)
        outbox = DecodeOutbox(self.recorder, config.rows, self.pairs.ended, None, number)
        outbox.retries, outbox.on_first = self.pairs.retries, self.pairs.answered
        return outbox

    def _script(self, rid: str) -> tuple[int, np.ndarray]:
        return self.jobs[rid].script()

    def row(self, rid: str) -> RequestRow:
        """What the record says of a request."""
        return next(row for row in self.recorder.rows if row.request_id == rid)

    def run(self, events: Sequence[tuple[float, Callable[[], None]]] = (), until_s: float | None = None) -> PairWorld:
        """Deliver the jobs, and do other things at their moments."""

        def deliver():
            todo = [(job.arrival_s, lambda job=job: self._send(job)) for job in self.jobs.values()]
            for at_s, act in sorted([*todo, *events], key=lambda one: one[0]):
                if at_s > self.clock.now:
                    yield self.clock.timeout(at_s - self.clock.now)
                act()
            yield self.clock.timeout(0)

        self.clock.process(deliver())
        self.clock.run(until=until_s)
        return self

    def _send(self, job: Job) -> None:
        trace = TraceRequest(job.rid, job.arrival_s, len(job.prompt), job.writes)
        self._requests[job.rid] = request = ClientRequest(trace, message=job.message())
        self.pairs.send(request)

    # -- trouble ---------------------------------------------------------------------------------------------------------

    def abort(self, rid: str) -> None:
        """The client of a request goes away: both its instances are told."""
        row = self.recorder.by_id.get(rid)
        if row is not None and row.handover is not None:
            for number in (row.handover.decode_instance, row.handover.prefill_instance):
                self.inboxes[number].put(Abort(rid))

    def lose(self, rid: str) -> None:
        """The wire loses the transfer of a request, if it is in one."""
        for half in self.prefill:
            scheduler = half.scheduler
            assert isinstance(scheduler, PrefillScheduler)
            req = scheduler.lifecycle.by_id.get(rid)
            if req is not None and req.pair is not None:
                self.wires.network.stop(req.pair.room)
                self.inboxes[half.number].put(TransferFailed(req.pair.room))

    def kill(self, number: int) -> None:
        """An instance is gone for good, unless it is the last one of its role."""
        half, side = self.halves[number], self.pairs.prefill if number < len(self.prefill) else self.pairs.decode
        if number in self.wires.gone or len(side.open) == 1:
            return
        half.loop.close()
        self.wires.cut(number)
        self.pairs.gone(number, lambda rid: self._written(half, rid))

    def _written(self, half: Half, rid: str) -> int:
        """How much a request had written where it was decoded."""
        assert isinstance(half.scheduler, DecodeScheduler)
        written = half.scheduler.written(rid)
        assert self.skip is not None or written == len(self.outputs.get(rid, ()))
        return written


class _Watched:
    """An outbox, and checks at every step."""

    def __init__(self, world: PairWorld, number: int, outbox: PrefillOutbox | DecodeOutbox) -> None:
        self._world, self._number, self._outbox = world, number, outbox

    def scheduled(self, batch: ScheduleBatch) -> None:
        self._outbox.scheduled(batch)
        self._world.halves[self._number].batches.append(batch)
        self._check()

    def send(self, result: StepResult, now: float | None = None) -> None:
        half = self._world.halves[self._number]
        if isinstance(self._outbox, DecodeOutbox):
            self._note(result)
        half.ended += result.ended
        if now is None:
            self._outbox.send(result)
        else:
            assert isinstance(self._outbox, DecodeOutbox)
            self._outbox.send(result, now)
        self._check()

    def scheduled_decodes(self, newest: ScheduleBatch, kv_used_tokens: Sequence[int]) -> None:
        assert isinstance(self._outbox, DecodeOutbox)
        self._outbox.scheduled_decodes(newest, kv_used_tokens)

    def send_decodes(self, batch: ScheduleBatch, moments_s: list[float]) -> None:
        assert isinstance(self._outbox, DecodeOutbox)
        self._outbox.send_decodes(batch, moments_s)
        self._check()

    def _note(self, result: StepResult) -> None:
        """Keep the tokens that requests get."""
        outputs = self._world.outputs
        for req, token, _ in result.joined:
            if token is not None:
                outputs.setdefault(req.rid, []).append(token)
        if result.batch is not None:
            assert result.output is not None
            for i, req in enumerate(result.batch.reqs):
                if i not in (result.batch.dropped or ()):
                    outputs.setdefault(req.rid, []).append(int(result.output.tokens[i]))

    def _check(self) -> None:
        if self._world.skip is None:
            self._world.halves[self._number].scheduler.check()
