"""The overlap loop of an instance that decodes alone."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Forward, Inbox, Outbox, Wait, Wire
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult


def decode_overlap_loop(
    scheduler: DecodeScheduler, backend: Backend, inbox: Inbox, outbox: Outbox, wire: Wire
) -> Generator[Wait, None, None]:
    """The overlap loop, and before a batch is chosen the queues are polled: requests get pages to receive their KV in, and
    those whose KV has arrived join the batch. Their first tokens go out at once, while the batch before runs."""
    last: tuple[ScheduleBatch, Forward] | None = None
    while True:
        if last is None and scheduler.idle:
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
        if batch is None and last is None:
            report_ended(scheduler, outbox)
            yield backend.cpu()
            if scheduler.paused and not scheduler.idle:
                yield inbox.arrival()  # nothing but a message changes that
            continue
        launched: tuple[ScheduleBatch, Forward] | None = None
        if batch is not None:
            worker = batch.worker
            backend.host("schedule", worker)
            launched = batch, backend.launch(worker)
            backend.host("launch", worker)
            outbox.scheduled(batch)
        result: StepResult | None = None
        if last is not None:
            done, forward = last
            yield backend.done(forward)
            result = scheduler.process(done, forward.output())
            backend.host("process", done.worker, len(result.ended))
        if batch is not None and batch.worker.masked is not None:
            assert launched is not None
            backend.sample(launched[1], scheduler.masks(batch))  # what may follow what has just been processed
        yield backend.cpu()  # with nothing to process, too: the next look at the inbox comes after the launch
        if result is not None:
            outbox.send(result)
        last = launched
