"""Many decode steps at once, for a backend that can tell what they will bring.

Most steps of a run decode the very requests of the step before. A simulation knows how long that goes on: until a message
comes, or a token ends a request. This module does to the scheduler's state what forming and processing that many batches
one by one would do, and nothing else; a property test holds the two equal.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult, stops

MOST_STEPS = 128
"""At a time: what is prepared for them is thrown away if a message comes before."""
_AHEAD = np.arange(2 * MOST_STEPS)[:, None]


class SteadyDecode:
    """The decode steps ahead of a scheduler in which it has nothing to decide."""

    def __init__(
        self, scheduler: Scheduler, page_needs: list[int], pages: list[int], other: ScheduleBatch | None
    ) -> None:
        self._scheduler = scheduler
        self._page_needs = page_needs
        self._pages = pages
        """Their running total."""
        self.steps = len(page_needs)
        """Batches that will be formed of the running requests, unless a message comes or a sample ends one of them."""
        self.other = other
        """The oldest batch in flight, if its requests are not the running ones: a prefill, or one that holds a request that
        has ended since. It has to be processed (:meth:`process_other`) before anything is taken."""

    def process_other(self, tokens: np.ndarray) -> StepResult | None:
        """Process the batch ``other``, whose samples are ``tokens``; None, and nothing is done, if they end a request."""
        other = self.other
        assert other is not None
        if other.length_stops or (other.stop_ids is not None and stops(other.stop_ids, tokens)):
            return None
        return self._scheduler.process(other, tokens)

    def batch(self, ahead: int) -> ModelWorkerBatch:
        """The batch after the next ``ahead`` ones as it would be formed, without its pages."""
        state = self._scheduler.state
        running = state.slots[0].running
        count = running.count
        return ModelWorkerBatch(
            state.step + ahead, "decode", running.rows, running.lens + (ahead + 1), None, 0, count, 0, count,
            running.context_tokens + count * (ahead + 1), None, None, (), None, None, (),
            state.cache.used_tokens + self._pages[ahead] * state.config.page_size, len(state.waiting),
            self.running,
        )  # fmt: skip

    @property
    def running(self) -> int:
        """Requests that hold KV, with each of the next batches."""
        table = self._scheduler.state.table
        return table.rows - table.free_rows

    def used_tokens(self, steps: int) -> list[int]:
        """KV tokens held with each of the next ``steps`` batches."""
        state = self._scheduler.state
        used, size = state.cache.used_tokens, state.config.page_size
        return [used + pages * size for pages in self._pages[:steps]]

    def first_stop(self, tokens: np.ndarray) -> int:
        """Index of the first step whose ``tokens``, int[k, n], end a request, else k."""
        stop_ids = self._scheduler.state.slots[0].running.stop_ids
        if stop_ids is None:
            return len(tokens)
        same = tokens == stop_ids if stop_ids.ndim == 1 else tokens[:, :, None] == stop_ids
        hit = int(same.argmax())
        return hit // stop_ids.size if same.item(hit) else len(tokens)

    def take(self, tokens: np.ndarray, steps: int) -> None:
        """Form ``steps`` batches and process as many: ``tokens``, int[k, n], are the samples of the k oldest of the running
        requests, those in flight first. They are one less than ``steps`` if ``other`` was the first to be processed. None
        of them may end a request."""
        scheduler, other = self._scheduler, self.other
        state = scheduler.state
        slot, table, flight = state.slots[0], state.table, state.in_flight
        running, processed, formed = slot.running, len(tokens), len(flight)
        token_at = flight[0].token_at + _AHEAD[: formed + steps]
        # The batches in flight are those formed last. Loops hold the objects, so these stand for other steps now.
        workers = [batch.worker for batch in flight][processed:]
        if other is not None:
            other.stand_for(running.reqs, running.stop_ids)
            flight.appendleft(other)
        workers += [self.batch(ahead) for ahead in range(steps - len(flight) + len(workers), steps)]
        for ahead, (batch, worker) in enumerate(zip(flight, workers, strict=True), start=processed):
            batch.worker = worker
            batch.token_at = token_at[ahead]
        table.add_tokens(token_at[:processed].ravel(), tokens.ravel())
        # With one token a page, a row's pages and its tokens are numbered alike.
        one = state.config.page_size == 1
        page_at = token_at[formed - 1 : -1].ravel() if one else running.page_places(steps)
        table.add_pages(page_at, state.cache.allocate_steps(self._page_needs[:steps]))
        running.lens, running.token_at = workers[-1].seq_lens, token_at[-1]
        running.context_tokens += steps * running.count
        running.steps_to_stop -= steps
        scheduler.composer.repeated(slot, steps)
        state.step += steps


def steady_decode(scheduler: Scheduler, most: int) -> SteadyDecode | None:
    """The steps, at most ``most``, in which nothing is to be decided; None where there is none.

    That is so when the batches in flight decode exactly the running requests, nobody can be admitted, and there is KV. The
    oldest of several batches may be another one, if nobody waits for what its end may set free.
    """
    state = scheduler.state
    slot = state.slots[0]
    running, cache = slot.running, state.cache
    if len(state.slots) > 1 or scheduler.held or scheduler.has_deadlines or not state.in_flight:
        return None
    if state.chunked is not None or state.computed or state.ended or state.retracted:
        return None
    if state.waiting and not slot.full:
        return None
    oldest, *others = state.in_flight
    # The same object is the same members: whoever ends, joins or is retracted replaces it.
    if any(batch.worker.rows is not running.rows for batch in others):
        return None
    other = None if oldest.worker.rows is running.rows else oldest
    if other is not None and (state.waiting or not others):
        return None
    steps = min(most, MOST_STEPS, running.steps_to_stop - 1)
    if steps < 1:
        return None
    needs = running.page_needs(steps)
    pages = list(accumulate(needs))
    enough = bisect_right(pages, cache.available_pages)
    return SteadyDecode(scheduler, needs[:enough], pages[:enough], other) if enough else None
