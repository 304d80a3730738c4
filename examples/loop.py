"""An event loop of one's own: it looks at its inbox only every few steps.

Draining an inbox costs CPU time that the GPU waits for. A loop that looks less often makes steps shorter and first tokens
later. It is the normal loop (workbench/loops/normal.py) but for when it receives.

    python examples/loop.py
    workbench simulate trace.jsonl --loop normal,examples.loop:patient_loop
"""

import workbench
from traces import sample_path
from workbench.loops.intake import report_ended, take_in

STEPS_BETWEEN_LOOKS = 16


def patient_loop(scheduler, backend, inbox, outbox):
    """Receive every sixteenth time, schedule, launch, wait, process."""
    steps = 0
    while True:
        if scheduler.idle:
            scheduler.rest()
            yield inbox.arrival()
            steps = 0
        if steps % STEPS_BETWEEN_LOOKS == 0:  # the other loops look at every step
            take_in(scheduler, backend, inbox, outbox)
        steps += 1
        batch = scheduler.next_batch()
        if batch is None:
            report_ended(scheduler, outbox)
            yield backend.cpu()
            if scheduler.paused and not scheduler.idle:
                yield inbox.arrival()
            steps = 0
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


if __name__ == "__main__":
    for loop in ("normal", patient_loop):
        record = workbench.simulate(sample_path(), requests=60, loop=loop)
        queued_s = record.requests["queued_s"] - record.requests["arrival_s"]
        receive_s = record.iterations["receive_s"].sum()
        name = loop if isinstance(loop, str) else loop.__name__
        print(
            f"{name:12}  receiving {1e3 * receive_s:7.2f} ms   in the inbox {1e3 * queued_s.mean():6.2f} ms on average"
        )
