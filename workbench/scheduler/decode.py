"""The decode part of a batch: pages for everyone, or someone goes back to the queue."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.request import Finish
from workbench.scheduler.state import RETRACT_LOOKAHEAD, SchedulerState, Slot


class DecodeManager:
    """Makes room for the next token of every running request of a slot."""

    def __init__(self, state: SchedulerState, *, newest_first: bool) -> None:
        self.state = state
        self.newest_first = newest_first
        """Victims: the newest running request (mixed batching), else those that lose least."""

    def make_room(self, slot: Slot) -> tuple[bool, np.ndarray | None]:
        """Whether the running set can decode a step now, and the indices that need a page (None: all of them).

        Called when eviction cannot meet the need: retracts. The last request of all is not retracted for itself: if nothing
        else holds KV it can never fit and is ended; if something in flight may give KV back, the step has to wait.
        """
        self._retract(slot)
        running = slot.running
        needing = running.needing_page()
        need = running.count if needing is None else len(needing)
        return running.count > 0 and need <= self.state.cache.available_pages, needing

    def _retract(self, slot: Slot) -> None:
        state, running, cache = self.state, slot.running, self.state.cache
        needs = running.lens % state.config.page_size == 0
        need = int(needs.sum())
        others = state.running_count > running.count
        victims: list[int] = []
        for index in self._order(slot):
            if need <= cache.available_pages or (len(victims) == running.count - 1 and not others):
                break
            state.retract(running.reqs[index], int(running.lens[index]))
            victims.append(index)
            need -= int(needs[index])
        if victims:
            running.remove(victims)
        if need > cache.available_pages and state.chunked is not None:
            state.retract_chunked()
        if need <= cache.available_pages:
            self._raise_ratio(slot)
        elif running.count and not state.in_flight:
            (req,) = running.remove([0])
            req.output_len = req.kv_len + 1 - req.input_len
            state.end(req, Finish("aborted", "kv_exhausted"), req.kv_len, req.kv_len)
            state.ended.append(req)

    def _order(self, slot: Slot) -> list[int]:
        """Indices in the order of retraction."""
        running = slot.running
        if self.newest_first:
            return list(range(running.count - 1, -1, -1))
        generated = running.lens - np.array([req.input_len for req in running.reqs])
        prompts = np.array([req.input_len for req in running.reqs])
        order: list[int] = np.lexsort((-prompts, generated)).tolist()
        return order

    def _raise_ratio(self, slot: Slot) -> None:
        """Expect of the requests that are left what they have shown, plus a few steps."""
        running = slot.running
        bound = sum(req.max_new for req in running.reqs)
        generated = bound - int(running.remaining.sum())
        ratio = (generated + RETRACT_LOOKAHEAD * running.count) / (bound + 1)
        self.state.new_token_ratio = min(1.0, ratio)
