"""The budgets of a prefill that are charged the tokens that it computes (``charge = "tokens"``)."""

from __future__ import annotations

from workbench.scheduler.batches.prefill_budget import PrefillBudget
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.preemption import Preempts
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import PrefillRow
from workbench.scheduler.slots import Slot


class TokenBudget(PrefillBudget):
    """A decode that joins takes tokens of the budgets, and in the worst case as many pages of the pool as they fill."""

    exhausted = False

    def __init__(
        self, config: SchedulerConfig, parts: Parts, preemption: Preempts, slot: Slot, *, decodes: bool
    ) -> None:
        running = slot.running
        super().__init__(config, parts, preemption, slot, running.next_tokens if decodes else 0)
        holds = decodes and config.mixed_join == "before"
        self._held_pages = running.count * parts.kv.pages_for(1 + running.draft_tokens) if holds else 0
        self._cuts = self._chunk is not None and config.chunk_cut == "tokens"
        """A prompt that the budgets do not hold is cut to what is left of them."""
        self._promised_pages = 0
        """Pages that prompts of the step will have once all of them have been chosen."""

    @property
    def spent(self) -> bool:
        return self._cuts and (not self._chunk or self._prompt <= 0)

    def chunk_end(self, req: Req) -> int:
        kv, cut = self._kv, self._config.chunk_unit
        end = len(req.tokens)
        if self._chunk is not None:
            end = min(end, req.kv_len + self._config.chunk_at(req.kv_len, self._chunk))
        end = min(end, (kv.pages_for(req.kv_len) + kv.available_pages - self._held_pages) * kv.page_size)
        if end < len(req.tokens):
            end = end // cut * cut
        elif self._slot.running.count >= self._config.max_running_per_slot:
            return req.kv_len  # its last chunk must land in a slot with room: another one has it
        return max(end, req.kv_len)

    def fits(self, req: Req, cached: int, *, alone: bool) -> bool:
        kv = self._kv
        extend = len(req.tokens) - cached
        enough = alone or self._estimate.need(req, extend) <= self._most_need()
        return enough and kv.pages_for(extend) <= kv.available_pages - self._held_pages - self._promised_pages

    def prompt_end(self, req: Req, cached: int, *, first: bool) -> int:
        extend = len(req.tokens) - cached
        if extend > self._prompt and not first and not self._cuts:
            return cached
        if self._chunk is not None:
            chunk = self._config.chunk_at(cached, self._chunk)
            if self._cuts and not first:
                chunk = min(chunk, self._prompt)
            if extend > chunk:
                return cached + chunk // self._config.chunk_unit * self._config.chunk_unit
        return len(req.tokens)

    def spend(self, row: PrefillRow) -> None:
        tokens = row.end - row.start
        self._prompt -= tokens
        if self._chunk is not None:
            self._chunk -= tokens
        if row.last:
            self._reserved += self._estimate.most_output(row.req)
        if not self._at_once:
            self._reserved += self._estimate.rounded(tokens)
            self._promised_pages += self._kv.pages_for(row.end) - self._kv.pages_for(row.start)

    def _most_need(self) -> float:
        pages = self._kv.available_pages - self._held_pages
        return pages * self._kv.page_size - self._reserved - self._config.kv_margin
