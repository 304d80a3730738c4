"""The normal loop of an instance that prefills alone."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Inbox, Outbox, Wait, Wire
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.disaggregated.prefill_scheduler import PrefillScheduler


def prefill_normal_loop(
    scheduler: PrefillScheduler, backend: Backend, inbox: Inbox, outbox: Outbox, wire: Wire
) -> Generator[Wait, None, None]:
    """The normal loop, and the KV of each processed chunk goes on the wire: it is sent while the next one is computed.

    Word from decode instances, that they have room or that KV has arrived, comes with the other messages.
    """
    while True:
        if scheduler.idle:
            scheduler.rest()
            wire.wake_at(scheduler.due_s)
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
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
        wire.post(scheduler.take_orders())
