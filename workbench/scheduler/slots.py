"""Holders of KV: the running set of each micro-batch, and the one request whose prompt is partly computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.ragged import RaggedRunningSet
from workbench.scheduler.request import Req
from workbench.scheduler.running import RunningSet


@dataclass(slots=True, eq=False)
class Slot:
    """One micro-batch's place: the requests that decode together."""

    index: int
    running: RunningSet
    full: bool = False
    """Admission failed for want of KV or rows; not tried again before something is given back."""
    prefill_streak: int = 0
    """Prefill batches since the last one with decodes in it."""


class Slots(list[Slot]):
    """The slots of a scheduler, which take turns. A list, because one is looked up on every step."""

    def __init__(self, config: SchedulerConfig, table: TableManager) -> None:
        self.epochs: Iterator[int] = count()
        """Numbers for memberships: of running sets, and of batches with prefills in them."""
        super().__init__(Slot(index, self._running_set(config, table)) for index in range(config.slots))
        self.chunked: Req | None = None
        """The request whose prompt is partly computed. It belongs to no slot: its chunks ride with whichever comes next."""

    def _running_set(self, config: SchedulerConfig, table: TableManager) -> RunningSet:
        if not config.draft_tokens:
            return RunningSet(table, config.page_size, self.epochs)
        pool_tokens = Capacity.of(config).kv_tokens
        return RaggedRunningSet(table, config.page_size, self.epochs, config.draft_tokens, pool_tokens)

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
        return self.chunked is None

    def reopen(self) -> None:
        """KV or rows have been given back: whoever was turned away is looked at again."""
        for slot in self:
            slot.full = False

    def holders(self) -> list[tuple[Req, int]]:
        """Every request that decodes or is partly computed, and the tokens that its pages cover."""
        held = [(req, int(n)) for one in self.running_sets for req, n in zip(one.reqs, one.held_tokens, strict=True)]
        return held if self.chunked is None else [*held, (self.chunked, self.chunked.kv_len)]
