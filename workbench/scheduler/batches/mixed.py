"""vLLM v1's and Sarathi's way: one token budget, first for the running requests, then for waiting ones."""

from __future__ import annotations

from workbench.scheduler.admission import Admission
from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.memory import KVMemory
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Req
from workbench.scheduler.retraction import Retraction
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.slots import Slot


class DecodeFirstMixed:
    """Every batch holds the running requests, and what else fits."""

    def __init__(self, config: SchedulerConfig, parts: Parts, assembly: Assembly) -> None:
        self._config = config
        self._kv, self._slots, self._queue, self._lifecycle = parts.kv, parts.slots, parts.queue, parts.lifecycle
        self._admission = Admission(config, parts)
        self._retraction = Retraction(config, parts, newest_first=True)
        self._assembly = assembly

    def form(self, slot: Slot) -> ScheduleBatch | None:
        running = slot.running
        needing = None
        before = len(self._lifecycle.retracted)
        if running.count and not running.stalled:
            need = running.needing_page()
            if (running.count if need is None else len(need)) > self._kv.available_pages:
                # The newest request of all is the one whose prompt is unfinished, if there is one.
                if self._slots.chunked is not None:
                    self._lifecycle.retract_chunked()
                ready, needing = self._retraction.make_room(slot)
                if not ready and running.count:
                    return None
            else:
                needing = need
        decodes = running.count > 0 and not running.stalled
        held = 0 if not decodes else running.count if needing is None else len(needing)
        rows: list[PrefillRow] = []
        if len(self._lifecycle.retracted) == before and (self._slots.chunked is not None or self._queue.waiting):
            rows = self._prefill(slot, held)
        if not decodes and not rows:
            return None
        return self._assembly.prefill(slot, rows, decodes, needing) if rows else self._assembly.decode(slot, needing)

    def decoded(self, slot: Slot, steps: int) -> None:
        pass  # it keeps no account of decode steps

    def _prefill(self, slot: Slot, held_pages: int) -> list[PrefillRow]:
        budget = _Budget(self._config, self._kv, slot, held_pages)
        req = self._slots.chunked
        if req is not None and budget.lacks_pages(req):
            # Someone else holds the rest: a prompt that is alone always fits, or it would have been refused.
            self._lifecycle.retract_chunked()
            return []
        return self._admission.form(slot, budget)


class _Budget:
    """The rest of a step's tokens, and of the pages beside the ``held_pages`` of its decodes."""

    def __init__(self, config: SchedulerConfig, kv: KVMemory, slot: Slot, held_pages: int) -> None:
        self._config = config
        self._kv = kv
        self._slot = slot
        self._held_pages = held_pages
        self._tokens = max(config.max_batch_tokens - slot.running.next_tokens, 0)

    exhausted = False

    @property
    def spent(self) -> bool:
        return self._tokens <= 0

    def chunk_end(self, req: Req) -> int:
        end = min(len(req.tokens), req.kv_len + self._config.chunk_at(req.kv_len, self._tokens))
        if end == len(req.tokens) and self._slot.running.count >= self._config.max_running_per_slot:
            return req.kv_len  # its last chunk must land in a slot with room: another one has it
        return end

    def lacks_pages(self, req: Req) -> bool:
        """Tell whether there is no KV for the next chunk of a request that has a row."""
        return self._lack(self._kv.pages_for(self.chunk_end(req)) - self._kv.pages_for(req.kv_len))

    def fits(self, req: Req, cached: int, *, alone: bool) -> bool:
        return not self._lack(self._kv.pages_for(self.prompt_end(req, cached, first=False) - cached))

    def prompt_end(self, req: Req, cached: int, *, first: bool) -> int:
        return min(len(req.tokens), cached + self._config.chunk_at(cached, self._tokens))

    def spend(self, row: PrefillRow) -> None:
        self._tokens -= row.end - row.start

    def make_room(self, req: Req) -> bool:
        return False  # nobody is preempted for a waiting request

    def _lack(self, pages: int) -> bool:
        return pages > self._kv.available_pages - self._held_pages
