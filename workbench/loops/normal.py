"""The normal loop: wait for each batch before thinking about the next."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Inbox, Outbox, Wait
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.scheduler import Scheduler


def normal_loop(scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox) -> Generator[Wait, None, None]:
    """receive, schedule, launch, wait, process; the GPU idles while the CPU works and the other way round."""
    while True:
        if scheduler.idle:
            scheduler.rest()
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
        batch = scheduler.next_batch()
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
