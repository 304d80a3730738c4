"""Find the coming steps of a scheduler that are decided already, and take many of them at once.

Most steps of a run decode the very requests of the step before. Where samples are known beforehand, so is how long that
goes on: until a message comes, or a token ends a request. What is here changes the scheduler's state as forming and
processing that many batches one by one would, and nothing else; property tests hold the two equal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch, StepOutput, step_numbers
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.scheduler.stops import stopped

MOST_STEPS = 128
"""At a time: what is prepared for them is thrown away if a message comes before."""
_STEPS = step_numbers(MOST_STEPS + 1)


class DecidedSteps:
    """The coming steps of a scheduler, of which each forms a batch of the running requests and processes the oldest."""

    def __init__(
        self, scheduler: Scheduler, steps: int, needing: np.ndarray | None, others: list[ScheduleBatch]
    ) -> None:
        self._scheduler = scheduler
        self._needing = needing
        """What starts a page in ``steps`` of them, as :meth:`RunningSet.needing_page` has it."""
        self._slot = scheduler.slots[0]
        count = self._slot.running.count
        self._page_needs: list[int] = [count] * steps
        """Pages that each takes."""
        if needing is not None:
            self._page_needs = np.bincount(needing // count, minlength=steps).tolist()
        pages = list(accumulate(self._page_needs))
        self._pages = pages[: bisect_right(pages, scheduler.kv.available_pages)]
        """Pages that are taken with each and before, as long as there are any."""
        self.steps = len(self._pages)
        """Batches that will be formed of the running requests, unless a message comes or a sample ends one of them."""
        self.others = others
        """The oldest batches in flight, whose requests are not the running ones: a prefill, or one that holds a request that
        has ended since. They have to be processed (:meth:`process_other`) before anything is taken."""
        if not self.steps:
            return  # there is no page for the first
        flight = scheduler.flights
        self.launched = len(flight) > len(others)
        """Some batch in flight is of the running requests."""
        self.newest = flight[-1].worker if self.launched else self.batch(0)
        """The newest batch of the running requests: one in flight, or the first that will be formed."""
        self.oldest = flight[len(others)].worker if self.launched else self.newest
        """The oldest of them that is not processed."""

    def others_end(self, outputs: Sequence[StepOutput]) -> bool:
        """Tell whether processing ``others``, which have these outputs, may end a request."""
        pairs = zip(self.others, outputs, strict=True)
        return any(other.length_stops or stopped(other.stop_ids, output.tokens) for other, output in pairs)

    def process_other(self, number: int, output: StepOutput) -> StepResult:
        """Process the oldest batch in flight, which is ``others[number]``. Its ``output`` may end no request."""
        scheduler = self._scheduler
        if number:  # a batch was formed between the last one and this one
            scheduler.batching.decoded(self._slot, 1)
        result = scheduler.process(self.others[number], output)
        if not number:
            scheduler.flights.share_computed()
        return result

    def batch(self, ahead: int) -> ModelWorkerBatch:
        """The batch that will be formed after the next ``ahead`` ones, without its pages."""
        scheduler, running = self._scheduler, self._slot.running
        kv, count = scheduler.kv, running.count
        table = kv.table
        # As Assembly.decode makes them, and positional as there: keywords would double the cost.
        return ModelWorkerBatch(
            scheduler.assembly.step + ahead,
            "decode",
            running.rows,
            running.epoch,
            running.lens + _STEPS[ahead + 1],
            running.query_lens,
            0,
            count,
            0,
            count,
            running.context_tokens + count * (ahead + 1),
            None,
            None,
            (),
            None,
            None,
            (),
            kv.used_tokens + self._pages[ahead] * kv.page_size,
            len(scheduler.queue.waiting) + scheduler.queue.elsewhere,
            table.rows - len(table.free) - table.aside,
        )

    def kv_used_tokens(self, steps: int) -> list[int]:
        """KV tokens held with each of the next ``steps`` batches."""
        kv = self._scheduler.kv
        used, size = kv.used_tokens, kv.page_size
        return [used + pages * size for pages in self._pages[:steps]]

    def first_stop(self, tokens: np.ndarray) -> int:
        """Index of the first step whose ``tokens``, int[k * n], step after step, end a request, else k."""
        running = self._slot.running
        places = stopped(running.stop_ids, tokens)
        return (places[0] if places else len(tokens)) // running.count

    def take(self, tokens: np.ndarray, steps: int) -> None:
        """Form ``steps`` batches and process as many: first ``others``, as has been done, then the oldest of the running
        requests, those in flight first. The samples of these are the first of ``tokens``, int[k * n], step after step, and
        none may end a request.

        A loop keeps the batches in flight in variables of its own and goes on with them afterwards. So these objects stay,
        in their order, and each is made the batch that is then in its place.
        """
        scheduler, others = self._scheduler, self.others
        slot, kv, flight = self._slot, scheduler.kv, scheduler.flights
        running, processed, needing = slot.running, steps - len(others), self._needing
        places = running.places(steps)
        # The samples of those in flight, and then of those that are both formed and processed.
        formed = processed - len(flight)
        ats = [batch.token_at for batch in flight][:processed]
        if formed > 0:
            ats.append(places[1 : 1 + formed].ravel())
        first = 0
        for at in ats:
            kv.table.add_tokens(at, tokens[first : first + len(at)])
            first += len(at)
        # In flight are then those that were not processed, and the last of those formed.
        coming = [(batch.worker, batch.token_at) for batch in flight][processed:]
        for other in reversed(others):
            other.stand_for(running.reqs, running.stop_ids)
            flight.appendleft(other)
        first = steps - len(flight) + len(coming)
        coming += [(self.batch(ahead), places[ahead + 1]) for ahead in range(first, steps)]
        for batch, (worker, token_at) in zip(flight, coming, strict=True):
            batch.worker, batch.token_at = worker, token_at
        pages = self._pages[steps - 1]
        if needing is not None:
            needing = needing[:pages]
        needs = self._page_needs[:steps]
        ahead = scheduler.config.evicts_ahead
        taken = kv.allocate_ahead(pages, needs, running.count) if ahead else kv.allocate(pages, needs)
        running.advance_all(needing, taken, places)
        if kv.cache.names_at_once:
            known = running.lens - (len(flight) - 1)  # the newest of the batches was formed with the others in flight
            kv.cache.fill_decodes(running.reqs, running.rows, known)
        scheduler.batching.decoded(slot, steps - max(len(others) - 1, 0))
        scheduler.assembly.step += steps


def decided_steps(scheduler: Scheduler, most: int) -> DecidedSteps | None:
    """The steps, at most ``most``, in which nothing is to be decided; None where there is none.

    That is so when the batches in flight decode exactly the running requests, nobody can be admitted, and there is KV. The
    oldest ones may be others if nobody waits for what their end may set free; all but the first must hold on to nothing,
    for batches are formed between their ends.
    """
    slots, queue, flights, lifecycle = scheduler.slots, scheduler.queue, scheduler.flights, scheduler.lifecycle
    slot = slots[0]
    running = slot.running
    if scheduler.config.draft_tokens:
        return None  # how many tokens a step brings is known only once it is done
    if len(slots) > 1 or scheduler.held or queue.has_deadlines or not flights:
        return None
    if slots.partial or lifecycle.ended or lifecycle.retracted:
        return None
    if scheduler.aborting or slot.lingering or slot.reopens:
        return None  # somebody ends with the next result, or leaves with the next decode
    if (queue.waiting or queue.elsewhere) and not slot.full:
        return None
    others: list[ScheduleBatch] = []
    for number, batch in enumerate(flights):
        worker = batch.worker
        if worker.masked is not None or worker.kv_copies:
            return None  # such a step waits for more than the one before it
        if worker.epoch != running.epoch:
            if (
                queue.waiting
                or queue.elsewhere
                or number > len(others)
                or (number and (batch.release or batch.release_rows))
            ):
                return None
            if worker.num_prefill and scheduler.config.share_prompts == "result":
                return None  # what is shared with its result depends on what has been formed by then
            others.append(batch)
    if flights.computed and not others:
        return None
    overrun = running.overrun
    if others and overrun:
        return None  # who ends with them is known only with their results
    steps = min(most, MOST_STEPS, running.steps_to_stop - 1 - overrun)
    if steps < 1:
        return None
    decided = DecidedSteps(scheduler, steps, running.needing_page(steps), others)
    return decided if decided.steps else None
