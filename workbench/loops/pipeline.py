"""The pipeline loop: one micro-batch a stage in flight, or more."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from workbench.backend import Backend, Forward, Inbox, Outbox, Wait
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler


def pipeline_loop(scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox) -> Generator[Wait, None, None]:
    """Slots take turns: each launches a micro-batch into the first stage, then the oldest result is waited for.

    A slot is chosen for again only when its last micro-batch has been processed. Slots with nothing to run are passed
    over, so that a single busy slot is not slowed by empty ones. With more slots than stages a micro-batch waits at the
    first stage while the CPU processes another and chooses the next: then the stages do not idle for it.
    """
    slots = scheduler.config.slots
    flights: deque[tuple[ScheduleBatch, Forward]] = deque()
    slot = 0
    while True:
        if not flights and scheduler.idle:
            scheduler.rest()
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
        launched = False
        busy = {batch.slot for batch, _ in flights}
        for turn in range(slots):
            candidate = (slot + turn) % slots
            if candidate in busy:
                continue
            batch = scheduler.next_batch(candidate)
            if batch is None:
                continue
            backend.host("schedule", batch.worker)
            forward = backend.launch(batch.worker)
            backend.host("launch", batch.worker)
            if batch.worker.masked is not None:
                backend.sample(forward, scheduler.masks(batch))
            outbox.scheduled(batch)
            flights.append((batch, forward))
            slot = (candidate + 1) % slots
            launched = True
            break
        if launched and len(flights) < slots:
            # The next slot may go at once, after its own look at the inbox.
            yield backend.cpu()
            continue
        if flights:
            batch, forward = flights.popleft()
            yield backend.done(forward)
            result = scheduler.process(batch, forward.output())
            backend.host("process", batch.worker, len(result.ended))
            yield backend.cpu()
            outbox.send(result)
            continue
        report_ended(scheduler, outbox)
        yield backend.cpu()
        if scheduler.paused and not scheduler.idle:
            yield inbox.arrival()  # nothing but a message changes that
