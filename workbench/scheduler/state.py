"""The state all parts of the scheduler share, and the few ways a request moves through it."""

from __future__ import annotations

import random
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.cache import CacheManager
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.policy import PolicyView
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.running import RunningSet, place_of
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.sessions import Sessions

OUTPUT_ESTIMATE_LIMIT = 4096
"""Admission expects no request to write more than this many tokens, whatever its bound."""
RETRACT_LOOKAHEAD = 20
"""Decode steps that the estimate after a retraction should last for."""
RATIO_DECAY_STEPS = 600


@dataclass(slots=True)
class Slot:
    """One micro-batch's place: the requests that decode together."""

    index: int
    running: RunningSet
    full: bool = False
    """Admission failed for want of KV or rows; not tried again before something is given back."""
    prefill_streak: int = 0
    """Prefill batches since the last one with decodes in it."""


@dataclass(slots=True, eq=False)
class SchedulerState:
    """Queue, running sets, pools, and what is in flight."""

    config: SchedulerConfig
    clock: Callable[[], float]
    table: TableManager = field(init=False)
    cache: CacheManager = field(init=False)
    slots: list[Slot] = field(init=False)
    epochs: Iterator[int] = field(default_factory=count)
    """Numbers for memberships: of running sets, and of batches with prefills in them."""
    waiting: list[Req] = field(default_factory=list)
    """In order of arrival; a retracted request returns to its place."""
    chunked: Req | None = None
    """The request whose prompt is partly computed."""
    in_flight: deque[ScheduleBatch] = field(default_factory=deque)
    """Formed and not yet processed, oldest first."""
    computed: list[Req] = field(default_factory=list)
    """Prefilled in the last batch; they enter the prefix cache when the next one is formed."""
    by_id: dict[str, Req] = field(default_factory=dict)
    sessions: Sessions = field(default_factory=Sessions)
    ended: list[Req] = field(default_factory=list)
    """Ended outside the processing of a batch, to be reported with the next result."""
    retracted: list[Req] = field(default_factory=list)
    """Retracted while the batch being formed was formed."""
    new_token_ratio: float = 0.0
    step: int = 0
    rng: random.Random = field(init=False)
    _ratio_least: float = field(init=False)
    _ratio_step: float = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.table = TableManager(config.max_running_per_slot * config.slots, config.max_context, config.page_size)
        self.cache = CacheManager(config.pages, config.page_size, self.table, config.cache, config.evict)
        self.slots = [Slot(i, RunningSet(self.table, config.page_size, self.epochs)) for i in range(config.slots)]
        self.rng = random.Random(config.seed)
        self._scale_ratio()

    # -- the estimate of how much of their output bound requests use ------------------------------------------------

    @property
    def initial_ratio(self) -> float:
        return min(0.7 * self.config.conservativeness, 1.0)

    def _scale_ratio(self) -> None:
        self._ratio_least = 0.14 * self.initial_ratio
        self._ratio_step = (self.initial_ratio - self._ratio_least) / RATIO_DECAY_STEPS
        self.reset_ratio()

    def take_config(self, config: SchedulerConfig) -> None:
        """Go on under other settings (:meth:`SchedulerConfig.changed`): whoever was turned away is looked at again."""
        scaled = config.conservativeness != self.config.conservativeness
        self.config = config
        if scaled:
            self._scale_ratio()
        self.memory_freed()

    def reset_ratio(self) -> None:
        self.new_token_ratio = self.initial_ratio

    def decay_ratio(self, steps: int = 1) -> None:
        """After decode steps without retraction: fall in equal steps towards 14 % of the initial value."""
        for _ in range(steps):
            if self.new_token_ratio == self._ratio_least:
                return
            self.new_token_ratio = max(self.new_token_ratio - self._ratio_step, self._ratio_least)

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def running_count(self) -> int:
        return sum(slot.running.count for slot in self.slots)

    @property
    def alone(self) -> bool:
        """Nothing holds KV or will give any back: whoever comes now gets all there is."""
        return not self.in_flight and self.chunked is None and not self.running_count

    def view(self) -> PolicyView:
        return PolicyView(self.cache, self.clock(), self.rng)

    # -- moves -----------------------------------------------------------------------------------------------------

    def enqueue(self, req: Req) -> None:
        if self.waiting and self.waiting[-1].seq > req.seq:
            insort(self.waiting, req, key=lambda r: r.seq)
        else:
            self.waiting.append(req)
        if self.config.preempt_threshold is not None:
            self.memory_freed()  # it may get in where those who waited could not

    def memory_freed(self) -> None:
        for slot in self.slots:
            slot.full = False

    def last_flight(self, req: Req) -> tuple[ScheduleBatch, int] | None:
        """The newest batch in flight that holds a request, and its index there."""
        flights = self.flights(req)
        return flights[-1] if flights else None

    def flights(self, req: Req) -> list[tuple[ScheduleBatch, int]]:
        """Every batch in flight that holds a request, oldest first, and its index there."""
        return [(batch, index) for batch in self.in_flight if (index := place_of(req, batch.reqs)) is not None]

    def samples_in_flight(self, req: Req) -> int:
        """Tokens that launched batches have yet to deliver to a request."""
        return sum(not _unsampled(batch, index) for batch, index in self.flights(req))

    def retract(self, req: Req, kv_len: int) -> None:
        """Take a request's KV away, keep what it has generated, and put it back into the queue.

        Its pages are free at once: a batch in flight may still read them, but whoever gets them writes in a later batch
        of the same stream. Its row is not: the host writes rows, so it waits for that batch.
        """
        flight = self.last_flight(req)
        samples = flight is not None and not _unsampled(flight[0], flight[1])
        if kv_len >= len(req.tokens):
            known = kv_len if samples else kv_len + 1
            req.tokens = self.table.tokens(req.row, known).copy()
            req.output_len = known - req.input_len
        self.cache.release(req, 0, kv_len, insert=False)
        if flight is None:
            self.table.give_row(req.row)
        else:
            batch, index = flight
            batch.release_rows = [*batch.release_rows, req.row]
            if samples:
                req.pending_token = True
                batch.late = {**(batch.late or {}), index: req}
        req.row = -1
        req.kv_len = 0
        req.retractions += 1
        self.retracted.append(req)
        self.enqueue(req)
        self.memory_freed()

    def retract_chunked(self) -> None:
        """Give up the partly computed prompt."""
        req = self.chunked
        assert req is not None
        self.chunked = None
        self.retract(req, req.kv_len)

    def forget_kv(self) -> None:
        """Take everybody's KV away, keeping what they have generated, and empty the prefix cache: no token in it is worth
        anything any more. Nothing may be in flight."""
        assert not self.in_flight, "a batch in flight reads what would be forgotten"
        for slot in self.slots:
            for req in slot.running.remove(range(slot.running.count)):
                self.retract(req, req.kv_len)
        if self.chunked is not None:
            self.retract_chunked()
        self.cache.flush()
        assert self.cache.pool.free == self.cache.pool.total, "somebody still holds KV"

    def end(self, req: Req, finish: Finish, valid_tokens: int = 0, held_tokens: int = 0) -> None:
        """Mark a request as ended and give back what it holds, once no batch in flight reads it.

        ``valid_tokens`` of its KV are worth keeping in the prefix cache; its pages cover ``held_tokens``.
        """
        req.finish = finish
        del self.by_id[req.rid]
        if req.session is not None:
            self.sessions.ended(req, self.table)
        if req.row < 0:
            if req in self.retracted:
                self.retracted.remove(req)  # the next batch must not name who has ended before it
            return
        flights = self.flights(req)
        for batch, index in flights:
            batch.dropped = {*(batch.dropped or ()), index}
        if flights:
            newest = flights[-1][0]
            newest.release = [*newest.release, (req, valid_tokens, held_tokens)]
        else:
            self.give_back(req, valid_tokens, held_tokens)

    def give_back(self, req: Req, valid_tokens: int, held_tokens: int) -> None:
        """Release a request's pages, the computed ones to the prefix cache, and its row."""
        self.cache.release(req, valid_tokens, held_tokens, insert=True)
        self.table.give_row(req.row)
        req.row = -1
        self.memory_freed()

    def insert_computed(self) -> None:
        """Put the prompts of the last prefill into the prefix cache: the batch that computes them has been launched, and
        batches run in order."""
        for req in self.computed:
            if req.finish is None and req.row >= 0:
                self.cache.insert_computed(req)
        self.computed = []


def remove_from(queue: list[Req], gone: Sequence[Req]) -> None:
    """Take requests out of a list in place; quick when they are its head."""
    if all(a is b for a, b in zip(queue, gone, strict=False)) and len(gone) <= len(queue):
        del queue[: len(gone)]
    else:
        ids = {id(req) for req in gone}
        queue[:] = [req for req in queue if id(req) not in ids]


def _unsampled(batch: ScheduleBatch, index: int) -> bool:
    return batch.worker.unsampled is not None and index in batch.worker.unsampled
