"""The budgets of a prefill that are charged whole pages, and one more for every request (``charge = "pages"``)."""

from __future__ import annotations

from workbench.scheduler.batches.prefill_budget import PrefillBudget
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.preemption import Preempts
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import PrefillRow
from workbench.scheduler.slots import Slot


class PageBudget(PrefillBudget):
    """Who is about to end in flight, or has a place yet, takes tokens of the budgets as if it joined."""

    def __init__(
        self, config: SchedulerConfig, parts: Parts, preemption: Preempts, slot: Slot, *, decodes: bool
    ) -> None:
        self._decodes = 0
        if decodes:
            self._decodes = slot.running.next_tokens + len(parts.flights.ending()) + len(slot.lingering)
        super().__init__(config, parts, preemption, slot, self._decodes)
        self._charged = 0
        """Tokens of KV that the prompts of the step have been charged."""
        self._taken_pages = 0
        """Pages that they have got already, and which are no longer there."""
        self._beside = config.page_size if config.page_beside else 0
        self._whole_prompts = config.prompt_budget == "whole"
        self._margin = 0 if config.preempt_for == "place" else 1
        """Tokens of KV that a preemption has to leave: what is wanted has to be less than what is left."""

    @property
    def spent(self) -> bool:
        return self._prompt <= 0 or (self._chunk is not None and self._chunk <= 0)

    @property
    def exhausted(self) -> bool:
        return self._left() <= 0

    def chunk_end(self, req: Req) -> int:
        kv, end = self._kv, len(req.tokens)
        if self._chunk is not None:
            chunk = self._config.chunk_at(req.kv_len, self._chunk)
            # Where nothing is left it goes on all the same, so that it can end and give back what it has.
            left = int(self._left())
            end = min(end, req.kv_len + (min(chunk, left) if left > 0 else chunk))
        most = (kv.pages_for(req.kv_len) + kv.available_pages) * kv.page_size
        if end > most:
            end = most // kv.page_size * kv.page_size
        if end == len(req.tokens) and self._slot.running.count >= self._config.max_running_per_slot:
            return req.kv_len  # its last chunk must land in a slot with room: another one has it
        return max(end, req.kv_len)

    def fits(self, req: Req, cached: int, *, alone: bool) -> bool:
        kv = self._kv
        extend = len(req.tokens) - cached
        need = extend + self._estimate.most_output(req) + self._beside
        return (alone or need < self._left()) and kv.pages_for(extend) <= kv.available_pages

    def prompt_end(self, req: Req, cached: int, *, first: bool) -> int:
        size = self._kv.page_size
        extend = self._paged(len(req.tokens) - cached)
        if (self._chunk is None or self._whole_prompts) and extend >= self._prompt and not first:
            return cached
        if self._chunk is None:
            return len(req.tokens)
        chunk = self._config.chunk_at(cached, self._chunk)
        if extend <= chunk:
            return len(req.tokens)
        return max((cached + chunk // size * size) // size * size, cached)

    def spend(self, row: PrefillRow) -> None:
        tokens = self._paged(row.end - row.start)
        self._prompt -= tokens
        if self._chunk is not None:
            self._chunk -= tokens
        self._charged += tokens + self._kv.page_size
        if row.last:
            self._charged += self._estimate.most(row.req.max_new)
        if self._at_once:
            self._taken_pages += self._kv.pages_for(row.end) - self._kv.pages_for(row.start)

    def _most_need(self) -> float:
        return self._left() - self._margin

    def _left(self) -> float:
        """KV that a new request may count on, in tokens."""
        pages = self._kv.available_pages + self._taken_pages
        # One sum after the other: a float that is compared exactly depends on the order.
        return pages * self._kv.page_size - (self._decodes + self._reserved + self._charged)

    def _paged(self, tokens: int) -> int:
        return self._kv.pages_for(tokens) * self._kv.page_size
