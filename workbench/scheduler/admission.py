"""Taking requests from the queue into a prefill: one walk for both batchings, each with a budget of its own."""

from __future__ import annotations

from enum import Enum, auto
from itertools import count
from typing import Protocol

import numpy as np

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.prefix_cache import Match
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import PrefillRow
from workbench.scheduler.slots import Slot


class Budget(Protocol):
    """Budget that one step may still spend on prompts. Lengths are tokens of a request, its cached ones included."""

    @property
    def spent(self) -> bool:
        """Nothing is left, whoever comes next."""
        ...

    def chunk_end(self, req: Req) -> int:
        """Return the end of this step's chunk of a prompt that has a row; ``kv_len`` where it has to wait."""
        ...

    def fits(self, req: Req, cached: int, *, alone: bool) -> bool:
        """Tell whether there is KV for a waiting request with ``cached`` tokens in the prefix cache. ``alone``: nobody
        else holds any."""
        ...

    def prompt_end(self, req: Req, cached: int, *, first: bool) -> int:
        """Return the end of this step's chunk of a waiting prompt; ``cached`` where it has to wait. ``first``: no
        other prompt is in the step."""
        ...

    def spend(self, row: PrefillRow) -> None:
        """A prompt, or a part of one, has joined the step."""
        ...

    @property
    def exhausted(self) -> bool:
        """No KV is left, whoever comes next."""
        ...

    def make_room(self, req: Req) -> bool:
        """Take what the first request in order needs from running ones, if that is allowed; whether it can be let in now."""
        ...


class _Verdict(Enum):
    WHOLE = auto()
    CHUNKED = auto()
    """Admitted, its prompt in part."""
    LATER = auto()
    """Passed over: a prompt in this step is about to put its beginning into the prefix cache."""
    NO_KV = auto()
    NO_BUDGET = auto()


class Admission:
    """Forms the prefill part of a step."""

    def __init__(self, config: SchedulerConfig, parts: Parts) -> None:
        self._config = config
        self._kv, self._slots, self._queue, self._flights = parts.kv, parts.slots, parts.queue, parts.flights
        prefill_first = config.batching == "prefill-first"  # as the rules have it that need this
        self._until_exhausted = prefill_first and config.full_when == "exhausted"
        self._fills = not prefill_first or config.full_when == "refused"
        self._at_once = not prefill_first or config.evict_for == "row"
        self._ahead = config.evicts_ahead
        self._rows_first, self._look_when_spent = config.rows_first, config.look_when_spent
        self._most_running = config.max_running_per_slot
        self._for_places = config.preempt_for == "place"
        self._turns = count()
        """Numbers of admissions."""

    def form(self, slot: Slot, budget: Budget) -> list[PrefillRow]:
        """The prompts of a step, empty when none can be computed: the partly computed one first, and if this completes it,
        waiting ones in order until the first that does not fit."""
        rows: list[PrefillRow] = []
        if self._until_exhausted:
            self._form_until_exhausted(slot, budget, rows)
        else:
            self._form(slot, budget, rows)
        if not self._at_once and rows:
            self._give_pages(rows)
        return rows

    def _form(self, slot: Slot, budget: Budget, rows: list[PrefillRow]) -> None:
        req = self._slots.chunked
        if req is not None:
            end = budget.chunk_end(req)
            if end == req.kv_len:
                return
            row = self.go_on(slot, req, end)
            rows.append(row)
            budget.spend(row)
            if not row.last:
                return
            self._slots.chunked = None
        if not slot.full and self._queue.waiting:
            self._walk(slot, budget, rows)

    def _form_until_exhausted(self, slot: Slot, budget: Budget, rows: list[PrefillRow]) -> None:
        """:meth:`_form` where a slot is full as soon as nothing is left."""
        req, queue, empty = self._slots.chunked, self._queue, self._empty(slot)
        if empty:
            slot.full = False
        if req is None:
            if slot.full or not queue.waiting:
                return
            if self._rows_first and self._crowded(slot, rows) and self._config.preempt_threshold is None:
                slot.full = True
                return
        elif not self._rows_first and self._places(slot) <= 0 and self._config.preempt_threshold is None:
            slot.full = True
            return
        ordered = queue.ordered() if queue.waiting else []
        if req is not None:
            slot.full = False  # what was computed of it has left its batch
            end = budget.chunk_end(req)
            if end > req.kv_len:
                row = self.go_on(slot, req, end)
                rows.append(row)
                budget.spend(row)
                if row.last:
                    self._slots.chunked = None
        admitted: list[Req] = []
        for req in ordered:
            if budget.spent and (admitted or not self._look_when_spent):
                break
            crowded = self._crowded(slot, rows)
            if self._for_places:
                slot.full = slot.full or crowded
                if slot.full and not budget.make_room(req):
                    break
            elif crowded and (rows or not budget.make_room(req)):
                slot.full = True
                break
            verdict = self._admit(req, slot, budget, rows)
            if verdict is _Verdict.NO_KV and not rows and not self._for_places and budget.make_room(req):
                verdict = self._admit(req, slot, budget, rows)
            if verdict is _Verdict.LATER:
                continue
            if verdict is _Verdict.NO_KV:
                slot.full = True
            if verdict in (_Verdict.NO_KV, _Verdict.NO_BUDGET):
                break
            admitted.append(req)
            if budget.exhausted:
                slot.full = True
                break
        queue.admitted(admitted)
        if empty or (self._for_places and self._config.preempt_threshold is not None):
            slot.full = False  # who runs from now on is another set, or whoever comes next may take a place

    def _empty(self, slot: Slot) -> bool:
        """Nobody decodes in a slot, nor is about to end in flight."""
        return not slot.running.count and not slot.lingering and not self._flights.ending()

    def _walk(self, slot: Slot, budget: Budget, rows: list[PrefillRow]) -> None:
        """Admit waiting requests into ``rows``. Whoever does not fit blocks those behind."""
        admitted: list[Req] = []
        for req in self._queue.ordered():
            if budget.spent:
                break
            if self._crowded(slot, rows) and (rows or not budget.make_room(req)):
                slot.full = self._fills
                break
            verdict = self._admit(req, slot, budget, rows)
            if verdict is _Verdict.NO_KV and not rows and budget.make_room(req):
                verdict = self._admit(req, slot, budget, rows)
            if verdict is _Verdict.LATER:
                continue
            if verdict is _Verdict.NO_KV:
                slot.full = self._fills
            if verdict in (_Verdict.NO_KV, _Verdict.NO_BUDGET):
                break
            admitted.append(req)
            if verdict is _Verdict.CHUNKED:
                break
        self._queue.admitted(admitted)

    def _crowded(self, slot: Slot, rows: list[PrefillRow]) -> bool:
        """Every place or every row is taken."""
        return len(rows) >= self._places(slot) or self._flights.free_rows <= 0

    def _places(self, slot: Slot) -> int:
        """How many may join who runs."""
        return self._most_running - slot.running.count - len(slot.lingering)

    def _admit(self, req: Req, slot: Slot, budget: Budget, rows: list[PrefillRow]) -> _Verdict:
        assert not req.pending_token, "a request cannot be admitted before its last token is known"
        cache = self._kv.cache
        match = cache.match(req)
        cached = match.device
        req.last_need = len(req.tokens) - cached
        if self.computed_in(rows, req, cached):
            return _Verdict.LATER
        alone = not rows and not self._flights and self._slots.empty
        if not budget.fits(req, cached, alone=alone):
            return _Verdict.NO_KV
        cache.lock(match.node)
        # Locking the prefix may have taken what eviction could have freed: look again.
        if not budget.fits(req, cached, alone=alone):
            cache.unlock(match.node)
            return _Verdict.NO_KV
        end = budget.prompt_end(req, cached, first=not rows)
        if end == cached or (end < len(req.tokens) and self._slots.chunked is not None):
            cache.unlock(match.node)
            return _Verdict.NO_BUDGET
        row = self.start(slot, req, match, end)
        rows.append(row)
        budget.spend(row)
        if row.last:
            return _Verdict.WHOLE
        self._slots.chunked = req
        return _Verdict.CHUNKED

    def computed_in(self, rows: list[PrefillRow], req: Req, cached: int) -> bool:
        """Tell whether this batch already computes enough of a request's prompt that waiting for it pays, if it may wait."""
        threshold = self._config.share_in_batch_tokens
        if threshold is None or not self._kv.cache.enabled or self._queue.overdue(req):
            return False
        size = self._kv.page_size
        shared = -(-(cached + threshold) // size) * size
        if shared >= len(req.tokens):
            return False
        for row in rows:
            other = row.req.tokens
            if (
                row.end >= shared
                and row.req.namespace == req.namespace
                and other[cached] == req.tokens[cached]
                and np.array_equal(other[:shared], req.tokens[:shared])
            ):
                return True
        return False

    def start(self, slot: Slot, req: Req, match: Match, end: int) -> PrefillRow:
        """Give a request, whose match is locked, a row and pages for its tokens up to ``end``."""
        kv, cached = self._kv, match.device
        req.row = row = kv.table.take_row()
        req.slot = slot.index
        req.node = match.node
        req.shared_pages = cached // kv.page_size
        kv.table.write_tokens(row, req.tokens)
        if self._at_once:
            new = kv.allocate(kv.pages_for(end) - req.shared_pages)
            kv.table.write_pages(row, 0, np.concatenate((kv.cache.path_pages(match.node), new)) if cached else new)
        elif cached:
            kv.table.write_pages(row, 0, kv.cache.path_pages(match.node))
        if not req.scheduled:
            req.scheduled = True
            req.cached_tokens = cached
        req.kv_len = end
        req.turn = next(self._turns)
        if kv.cache.names_at_once:
            kv.cache.started(req)
            if self._at_once:
                kv.cache.fill(req, end)
        return PrefillRow(req, cached, end, cached)

    def go_on(self, slot: Slot, req: Req, end: int) -> PrefillRow:
        """The next chunk of a request that has a row: pages for its tokens up to ``end``."""
        kv, start = self._kv, req.kv_len
        have = kv.pages_for(start)
        more = kv.pages_for(end) - have
        if more and self._at_once:
            kv.table.write_pages(req.row, have, kv.allocate(more))
        req.slot = slot.index
        req.kv_len = end
        if kv.cache.names_at_once and self._at_once:
            kv.cache.fill(req, end)
        return PrefillRow(req, start, end, 0)

    def _give_pages(self, rows: list[PrefillRow]) -> None:
        """Give the rows of a prefill their pages, once enough has been evicted for all of them and, ahead and where pages
        hold more than a token, a page a row."""
        kv = self._kv
        if self._ahead:
            kv.free_up(kv.pages_for(sum(row.end - row.start for row in rows)) + len(rows))
        else:
            kv.free_up(sum(kv.pages_for(row.end) - kv.pages_for(row.start) for row in rows))
        for row in rows:
            have = kv.pages_for(row.start)
            more = kv.pages_for(row.end) - have
            if more:
                kv.table.write_pages(row.req.row, have, kv.allocate(more))
            if kv.cache.names_at_once:
                kv.cache.fill(row.req, row.end)
