"""SGLang's way: prefill whenever admission allows, else decode."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.admission import Admission
from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.batches.page_budget import PageBudget
from workbench.scheduler.batches.token_budget import TokenBudget
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.place_preemption import PlacePreemption
from workbench.scheduler.preemption import Preemption
from workbench.scheduler.retraction import Retraction
from workbench.scheduler.schedule_batch import ScheduleBatch
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
        self._budget = PageBudget if config.charge == "pages" else TokenBudget
        self._joins_after = config.mixed_join == "after"
        if config.lingers:
            self.form = self._form_and_settle  # type: ignore[method-assign]
        self._waits_for_ends = not config.retract_while_ending
        self._ahead = config.evicts_ahead
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
