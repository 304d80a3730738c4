"""The overlap loop of an instance that prefills alone."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Forward, Inbox, Outbox, Wait, Wire
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.disaggregated.prefill_scheduler import PrefillScheduler
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult


def prefill_overlap_loop(
    scheduler: PrefillScheduler,
    backend: Backend,
    inbox: Inbox,
    outbox: Outbox,
    wire: Wire,
    *,
    overlap_prefills: bool = True,
) -> Generator[Wait, None, None]:
    """The overlap loop, and the KV of a chunk goes on the wire once its result has been processed: while the chunk after the
    next is chosen, the next one runs.

    Word from decode instances, that they have room or that KV has arrived, comes with the other messages. Every batch is a
    prefill: ``overlap_prefills=False`` waits for each before the next.
    """
    last: tuple[ScheduleBatch, Forward] | None = None
    while True:
        if last is None and scheduler.idle:
            scheduler.rest()
            wire.wake_at(scheduler.due_s)
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
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
            if last is not None and not overlap_prefills:
                yield from _process(scheduler, backend, outbox, wire, last)
                last = None
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
            wire.post(scheduler.take_orders())
        last = launched


def _process(
    scheduler: PrefillScheduler, backend: Backend, outbox: Outbox, wire: Wire, last: tuple[ScheduleBatch, Forward]
) -> Generator[Wait, None, None]:
    batch, forward = last
    yield backend.done(forward)
    result = scheduler.process(batch, forward.output())
    backend.host("process", batch.worker, len(result.ended))
    yield backend.cpu()
    outbox.send(result)
    wire.post(scheduler.take_orders())
