"""SGLang's way: prefill whenever admission allows, else decode."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.admission import Admission
from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.batches.page_budget import PageBudget
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.place_preemption import PlacePreemption
from workbench.scheduler.preemption import Preemption, Preempts
from workbench.scheduler.request import Req
from workbench.scheduler.retraction import Retraction
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.slots import Slot


class PrefillFirst:
    """Batches of prompts alone, or with the running requests beside them (``mixed_chunk``), and batches of decodes."""

    def __init__(self, config: SchedulerConfig, parts: Parts, assembly: Assembly) -> None:
        self._config = config
        self._kv, self._slots, self._queue, self._lifecycle = parts.kv, parts.slots, parts.queue, parts.lifecycle
        self._estimate = parts.estimate
        self._parts = parts
        self._admission = Admission(config, parts)
        self._preemption = (PlacePreemption if config.preempt_for == "place" else Preemption)(config, parts)
        self._retraction = Retraction(config, parts, newest_first=False)
        self._assembly = assembly
        self._budget = PageBudget if config.charge == "pages" else _Budget
        self._joins_after = config.mixed_join == "after"
        if config.lingers:
            self.form = self._form_and_settle  # type: ignore[method-assign]
        self._waits_for_ends = not config.retract_while_ending
        self._ahead = config.evict_for == "batch-ahead" and config.page_size > 1
        self._evicts_all = config.evict_amount == "all"
        self._decode = self._decode_ahead if self._ahead or self._evicts_all else assembly.decode

    def _form_and_settle(self, slot: Slot) -> ScheduleBatch | None:
        """:meth:`form` where who has ended takes a place until the next decode, or the next look at it that finds none."""
        if slot.unmerged is not None and slot.unmerged.worker.mode == "mixed":
            slot.settle()  # they were in it
        slot.unmerged = None
        batch = PrefillFirst.form(self, slot)
        if batch is None or not batch.prefill:
            slot.settle()
        else:
            slot.unmerged = batch
            if self._config.mixed_chunk:
                slot.lingering = []
        return batch

    def form(self, slot: Slot) -> ScheduleBatch | None:
        running = slot.running
        if self._slots.partial or (self._queue.waiting and not slot.full):
            streak = self._config.max_prefill_streak
            starved = streak is not None and slot.prefill_streak >= streak
            if not (starved and running.count):
                batch = self._prefill(slot)
                if batch is not None:
                    return batch
        if not running.count or running.stalled:
            return None
        needing = running.needing_page()
        if (running.count if needing is None else len(needing)) > self._kv.available_pages:
            if self._waits_for_ends and self._parts.flights.ending():
                self._kv.free_up(self._kv.pool.total)
                slot.full = False
                return None
            before = len(self._lifecycle.retracted)
            ready, needing = self._retraction.make_room(slot)
            if not ready:
                return None
            self.decoded(slot, 1 if len(self._lifecycle.retracted) == before else 0)
        else:
            self.decoded(slot, 1)
        return self._decode(slot, needing)

    def _decode_ahead(self, slot: Slot, needing: np.ndarray | None) -> ScheduleBatch:
        """A decode that evicts for a page of each request, whether it starts one or not."""
        if self._evicts_all and needing is not None:
            self._kv.free_up(len(needing))
        if self._ahead or needing is None:
            self._kv.free_up(slot.running.count)
        return self._assembly.decode(slot, needing)

    def decoded(self, slot: Slot, steps: int) -> None:
        slot.prefill_streak = 0
        self._estimate.decay(steps)

    def _prefill(self, slot: Slot) -> ScheduleBatch | None:
        running = slot.running
        if self._joins_after:
            return self._prefill_and_join(slot)
        # Decodes join only if each could take its pages without anyone being retracted for it.
        most_pages = running.count * self._kv.pages_for(1 + running.draft_tokens)
        joins = self._config.mixed_chunk and 0 < most_pages <= self._kv.available_pages and not running.stalled
        budget = self._budget(self._config, self._parts, self._preemption, slot, decodes=joins)
        rows = self._admission.form(slot, budget)
        if not rows:
            return None
        slot.prefill_streak = 0 if joins else slot.prefill_streak + 1
        return self._assembly.prefill(slot, rows, joins, running.needing_page() if joins else None)

    def _prefill_and_join(self, slot: Slot) -> ScheduleBatch | None:
        """A prefill whose prompts leave the running requests tokens, but not pages: these join if there are enough."""
        running, mixed = slot.running, self._config.mixed_chunk
        budget = self._budget(self._config, self._parts, self._preemption, slot, decodes=mixed)
        rows = self._admission.form(slot, budget)
        if not rows:
            return None
        joins, needing = False, None
        if mixed and running.count and not running.stalled:
            needing = running.needing_page()
            joins = (running.count if needing is None else len(needing)) <= self._kv.available_pages
        if joins:
            slot.full = False  # who runs now is another set
            if self._evicts_all and needing is not None:
                self._kv.free_up(len(needing))
            if self._ahead:
                self._kv.free_up(running.count)
        slot.prefill_streak = 0 if joins else slot.prefill_streak + 1
        return self._assembly.prefill(slot, rows, joins, needing if joins else None)


class _Budget:
    """The rest of a batch's budgets: KV, prompt tokens, chunk. The running requests share them if they join."""

    exhausted = False

    def __init__(
        self, config: SchedulerConfig, parts: Parts, preemption: Preempts, slot: Slot, *, decodes: bool
    ) -> None:
        self._config = config
        self._kv = parts.kv
        self._parts = parts
        self._preemption = preemption
        self._slot = slot
        # A decode takes tokens of the budgets, and in the worst case as many pages of the pool as they fill.
        running = slot.running
        tokens = running.next_tokens if decodes else 0
        holds = decodes and config.mixed_join == "before"
        self._held_pages = running.count * parts.kv.pages_for(1 + running.draft_tokens) if holds else 0
        self._prompt = config.max_prefill_tokens - tokens
        self._chunk = None if config.chunk is None else max(config.chunk - tokens, 0)
        self._reserved = self._expected()
        self._at_once = config.evict_for == "row"
        self._cuts = self._chunk is not None and config.chunk_cut == "tokens"
        """A prompt that the budgets do not hold is cut to what is left of them."""
        self._promised_pages = 0
        """Pages that prompts of the step will have once all of them have been chosen."""
        self.spent = self._cuts and (not self._chunk or self._prompt <= 0)

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
        enough = alone or self._parts.estimate.need(req, extend) <= self._total()
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
        if self._cuts:
            self.spent = not self._chunk or self._prompt <= 0
        if row.last:
            self._reserved += self._parts.estimate.most_output(row.req)
        if not self._at_once:
            self._reserved += self._parts.estimate.rounded(tokens)
            self._promised_pages += self._kv.pages_for(row.end) - self._kv.pages_for(row.start)

    def make_room(self, req: Req) -> bool:
        made = self._preemption.make_room(req, self._slot, self._total())
        self._reserved = self._expected()
        return made

    def _total(self) -> float:
        """KV that a new request may count on, in tokens."""
        pages = self._kv.available_pages - self._held_pages
        return pages * self._kv.page_size - self._reserved - self._config.kv_margin

    def _expected(self) -> float:
        return self._parts.estimate.reserved_tokens(self._parts.slots.running_sets)
