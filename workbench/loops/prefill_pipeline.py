"""The pipeline loop of an instance that prefills alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from workbench.backend import Backend, Forward, Inbox, Outbox, Wait, Wire
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.disaggregated.prefill_scheduler import PrefillScheduler
from workbench.scheduler.schedule_batch import ScheduleBatch


def prefill_pipeline_loop(
    scheduler: PrefillScheduler, backend: Backend, inbox: Inbox, outbox: Outbox, wire: Wire
) -> Generator[Wait, None, None]:
    """The pipeline loop, and the KV of a chunk goes on the wire once its result has come out of the last stage and has been
    processed. The chunks of a long prompt ride in consecutive slots, so that many of them are on their way at a time."""
    slots = scheduler.config.slots
    flights: deque[tuple[ScheduleBatch, Forward]] = deque()
    slot = 0
    while True:
        if not flights and scheduler.idle:
            scheduler.rest()
            wire.wake_at(scheduler.due_s)
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
        wire.post(scheduler.take_orders())
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
            wire.post(scheduler.take_orders())
            continue
        report_ended(scheduler, outbox)
        yield backend.cpu()
        if scheduler.paused and not scheduler.idle:
            yield inbox.arrival()  # nothing but a message changes that
