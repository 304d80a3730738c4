"""Holders of KV: the running set of each micro-batch, and the requests whose prompt is partly computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.ragged import RaggedRunningSet
from workbench.scheduler.request import Req
from workbench.scheduler.running import RunningSet
from workbench.scheduler.schedule_batch import ScheduleBatch


@dataclass(slots=True, eq=False)
class Slot:
    """One micro-batch's place: the requests that decode together."""

    index: int
    running: RunningSet
    full: bool = False
    """Admission failed for want of KV or rows; not tried again before something is given back."""
    lingering: list[Req] = field(default_factory=list)
    """Requests that have ended and take a place until the next decode, where they do (``leaves``)."""
    reopens: bool = False
    """With the next decode it is not full any more, for the same reason."""
    unmerged: ScheduleBatch | None = None
    """Its last batch, while nothing has been formed since, if it had prompts in it. Known only where requests linger."""
    prefill_streak: int = 0
    """Prefill batches since the last one with decodes in it."""

    def linger(self, batch: ScheduleBatch, ended: list[Req]) -> None:
        """Note who has ended with a batch: takes a place yet, unless nothing has been formed since the batch had prompts."""
        if self.unmerged is batch:
            self.full, self.reopens = False, bool(self.lingering)
        else:
            self.lingering = [*self.lingering, *ended]

    def settle(self) -> None:
        """Let go of those who linger."""
        if self.lingering or self.reopens:
            self.full = self.reopens = False
        self.lingering = []


class Slots(list[Slot]):
    """The slots of a scheduler, which take turns. A list, because one is looked up on every step."""

    def __init__(self, config: SchedulerConfig, table: TableManager) -> None:
        self._linger = config.lingers
        self.epochs: Iterator[int] = count()
        """Numbers for memberships: of running sets, and of batches with prefills in them."""
        super().__init__(Slot(index, self._running_set(config, table)) for index in range(config.slots))
        self.partial: list[Req] = []
        """Requests whose prompt is partly computed, in the order of their admission: one, unless the batching takes more.
        They belong to no slot: their chunks ride with whichever comes next."""

    def _running_set(self, config: SchedulerConfig, table: TableManager) -> RunningSet:
        if not config.draft_tokens:
            running = RunningSet(table, config.page_size, self.epochs)
            running.overrun = config.overrun
            return running
        pool_tokens = Capacity.of(config).kv_tokens
        return RaggedRunningSet(table, config.page_size, self.epochs, config.draft_tokens, pool_tokens)

    @property
    def chunked(self) -> Req | None:
        """The request whose prompt is partly computed, where there can be only one."""
        return self.partial[0] if self.partial else None

    @chunked.setter
    def chunked(self, req: Req | None) -> None:
        self.partial = [] if req is None else [req]

    @property
    def running_sets(self) -> list[RunningSet]:
        return [slot.running for slot in self]

    @property
    def running_count(self) -> int:
        """Requests that decode, over all slots."""
        return sum(slot.running.count for slot in self)

    @property
    def empty(self) -> bool:
        """Nobody decodes and no prompt is partly computed."""
        for slot in self:
            if slot.running.count:
                return False
        return not self.partial

    def reopen(self) -> None:
        """KV or rows have been given back: whoever was turned away is looked at again."""
        for slot in self:
            if self._linger and (slot.running.count or slot.lingering):
                slot.reopens = True
            else:
                slot.full = False

    def holders(self) -> list[tuple[Req, int]]:
        """Every request that decodes or is partly computed, and the tokens that its pages cover."""
        held = [(req, int(n)) for one in self.running_sets for req, n in zip(one.reqs, one.held_tokens, strict=True)]
        return [*held, *((req, req.kv_len) for req in self.partial)]
