"""The normal loop of an instance that decodes alone."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Inbox, Outbox, Wait, Wire
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler


def decode_normal_loop(
    scheduler: DecodeScheduler, backend: Backend, inbox: Inbox, outbox: Outbox, wire: Wire
) -> Generator[Wait, None, None]:
    """The normal loop, and before a batch is chosen the queues are polled: requests get pages to receive their KV in, and
    those whose KV has arrived join the batch. Their first tokens go out at once."""
    while True:
        if scheduler.idle:
            scheduler.rest()
            wire.wake_at(scheduler.due_s)
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
        joined = scheduler.poll()
        if joined is not None:
            yield backend.cpu()
            outbox.send(joined)
        batch = scheduler.next_batch()
        wire.post(scheduler.take_orders())
        if batch is None:
            report_ended(scheduler, outbox)
            yield backend.cpu()
            if scheduler.paused and not scheduler.idle:
                yield inbox.arrival()  # nothing but a message changes that
            continue
        backend.host("schedule", batch.worker)
        forward = backend.launch(batch.worker)
        backend.host("launch", batch.worker)
        if batch.worker.masked is not None:
            backend.sample(forward, scheduler.masks(batch))
        outbox.scheduled(batch)
        yield backend.done(forward)
        result = scheduler.process(batch, forward.output())
        backend.host("process", batch.worker, len(result.ended))
        yield backend.cpu()
        outbox.send(result)
