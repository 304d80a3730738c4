"""Room for the next token of every running request, or someone goes back to the queue."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Finish
from workbench.scheduler.slots import Slot


class Retraction:
    """Retracts running requests of a slot where eviction cannot meet what its next step needs."""

    def __init__(self, config: SchedulerConfig, parts: Parts, *, newest_first: bool) -> None:
        self._kv, self._slots, self._flights = parts.kv, parts.slots, parts.flights
        self._lifecycle, self._estimate = parts.lifecycle, parts.estimate
        self._newest_first = newest_first
        """Victims: the newest running request (mixed batching), else those that lose least."""
        self._ahead = None if newest_first else config.retract_ahead
        self._last_of_equals = config.retract_ties == "last"

    def make_room(self, slot: Slot) -> tuple[bool, np.ndarray | None]:
        """Tell whether the running set can decode a step now, and the indices that need a page (None: all of them).

        Called when eviction cannot meet the need: retracts. The last request of all is not retracted for itself: if nothing
        else holds KV it can never fit and is ended; if something in flight may give KV back, the step has to wait.
        """
        self._retract(slot)
        running = slot.running
        needing = running.needing_page()
        need = running.count if needing is None else len(needing)
        return running.count > 0 and need <= self._kv.available_pages, needing

    def _retract(self, slot: Slot) -> None:
        running, kv = slot.running, self._kv
        needs = running.needs()
        need = int(needs.sum())
        others = self._slots.running_count > running.count
        if self._ahead is not None:
            kv.free_up(need)
        for req, needed in [(running.reqs[index], int(needs[index])) for index in self._order(slot)]:
            if need <= kv.available_pages or (running.count == 1 and not others):
                break
            running.remove([running.reqs.index(req)])
            self._lifecycle.retract(req)
            need -= needed
            if self._ahead is not None:
                kv.free_up(kv.pages_for(running.count * self._ahead))
                kv.free_up(need)
        if need > kv.available_pages and self._slots.chunked is not None:
            self._lifecycle.retract_chunked()
        if need <= kv.available_pages:
            self._estimate.retracted(running)
        elif running.count and not self._flights:
            self._lifecycle.cut(running.reqs[0], Finish("aborted", "kv_exhausted"))

    def _order(self, slot: Slot) -> list[int]:
        """Indices in the order of retraction."""
        running = slot.running
        if self._newest_first:
            return list(range(running.count - 1, -1, -1))
        prompts = np.array([req.input_len for req in running.reqs])
        outputs = self._estimate.outputs(running)
        if self._last_of_equals:
            last: list[int] = np.lexsort((-prompts[::-1], outputs[::-1])).tolist()
            return [running.count - 1 - index for index in last]
        order: list[int] = np.lexsort((-prompts, outputs)).tolist()
        return order
