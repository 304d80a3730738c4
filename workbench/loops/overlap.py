"""The overlap loop: the CPU works on one batch while the GPU runs another."""

from __future__ import annotations

from collections.abc import Generator

from workbench.backend import Backend, Forward, Inbox, Outbox, Wait
from workbench.loops.intake import report_ended, take_in
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult


def overlap_loop(
    scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox, *, overlap_prefills: bool = True
) -> Generator[Wait, None, None]:
    """Launch batch n+1, then process the result of n while n+1 runs.

    A batch is chosen with the results of the one before the last: its input tokens that are still to be sampled stay on the
    device, and a request that stops costs one slot more. ``overlap_prefills=False`` waits between two consecutive prefills,
    so that the first one's tokens go out without waiting for the second to be chosen and launched.
    """
    last: tuple[ScheduleBatch, Forward] | None = None
    while True:
        if last is None and scheduler.idle:
            scheduler.rest()
            yield inbox.arrival()
        take_in(scheduler, backend, inbox, outbox)
        batch = scheduler.next_batch()
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
            if last is not None and not overlap_prefills and last[0].worker.num_prefill and worker.num_prefill:
                yield from _process(scheduler, backend, outbox, last)
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
        last = launched


def _process(
    scheduler: Scheduler, backend: Backend, outbox: Outbox, last: tuple[ScheduleBatch, Forward]
) -> Generator[Wait, None, None]:
    # The same as in the loop itself, which does not delegate: it would cost a twentieth of a simulated step.
    batch, forward = last
    yield backend.done(forward)
    result = scheduler.process(batch, forward.output())
    backend.host("process", batch.worker, len(result.ended))
    yield backend.cpu()
    outbox.send(result)
