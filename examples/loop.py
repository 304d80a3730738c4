"""An event loop of one's own: it looks at its inbox only every few steps.

Draining an inbox costs CPU time that the GPU waits for. A loop that looks less often makes steps shorter and first tokens
later. It is the normal loop (workbench/loops/normal.py) but for one line.

    python examples/loop.py
    workbench simulate trace.jsonl --loop normal,examples.loop:patient_loop
"""

from itertools import count

import workbench
from traces import sample_path
from workbench.loops.intake import report_ended, take_in

STEPS_BETWEEN_LOOKS = 16


def patient_loop(scheduler, backend, inbox, outbox):
    """Receive every sixteenth time, schedule, launch, wait, process."""
    for step in count():
        if scheduler.idle:
            scheduler.rest()
            yield inbox.arrival()
            take_in(scheduler, backend, inbox, outbox)
        elif step % STEPS_BETWEEN_LOOKS == 0:
            take_in(scheduler, backend, inbox, outbox)
        batch = scheduler.next_batch()
        if batch is None:
            report_ended(scheduler, outbox)
            yield backend.cpu()
            continue
        backend.host("schedule", batch.worker)
        forward = backend.launch(batch.worker)
        backend.host("launch", batch.worker)
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
