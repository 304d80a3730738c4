"""The first difference between two lists of decisions in words: both batches, and the state that led there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from workbench.parity.decide import Replayed, replay
from workbench.parity.recording import Recording
from workbench.parity.scenarios import RETRACTED
from workbench.parity.steps import Decision, StepInbox
from workbench.scheduler.scheduler import Scheduler

BEFORE = 3
"""Batches shown before the first one that differs."""


def explained(recording: Recording, replayed: Replayed, *, whole: bool) -> Iterator[str]:
    """Lines about the first difference of a scenario; ``whole``: with the batches before it and our scheduler's state after
    each."""
    at = replayed.equal_steps
    states: list[str] = []
    steps: list[int] = []

    def look(scheduler: Scheduler, inbox: StepInbox, decision: Decision) -> None:
        steps.append(inbox.step - 1)
        states.append(state(scheduler))

    replay(recording, replayed.scenario.key, look)
    step = steps[at] if at < len(steps) else steps[-1]
    yield (
        f"{replayed.scenario.key}: differs in batch {at} of {len(replayed.recorded)} (step {step}): "
        f"{difference(_batch(replayed.recorded, at), _batch(replayed.ours, at))}"
    )
    if not whole:
        return
    for number in range(max(at - BEFORE, 0), at + 1):
        yield f"  batch {number}" + (f", step {steps[number]}" if number < len(steps) else "")
        if number < at:
            yield f"    both    {_written(replayed.ours[number])}"
        else:
            yield f"    engine  {_written(_batch(replayed.recorded, number))}"
            yield f"    ours    {_written(_batch(replayed.ours, number))}"
        if number < len(states):
            yield from (f"    after   {line}" for line in states[number].splitlines())


def difference(engine: Decision | None, ours: Decision | None) -> str:
    """What tells two batches apart. None: there is no further one."""
    if engine is None or ours is None:
        return "the engine has no further batch" if engine is None else "ours has no further batch"
    parts = []
    gone, own_gone = set(engine.get(RETRACTED, ())), set(ours.get(RETRACTED, ()))
    for who, ids in (("only the engine", gone - own_gone), ("only ours", own_gone - gone)):
        if ids:
            parts.append(f"{who} retracts {' '.join(sorted(ids))}")
    rows = [one for one in sorted({*engine, *ours}) if one != RETRACTED]
    for who, has, lacks in (("only the engine", engine, ours), ("only ours", ours, engine)):
        alone = [f"{one} ({has[one]})" for one in rows if one in has and one not in lacks]
        if alone:
            parts.append(f"{who} runs {' '.join(alone)}")
    for one in rows:
        if one in engine and one in ours and engine[one] != ours[one]:
            parts.append(f"{one} computes {engine[one]} there and {ours[one]} here")
    return "; ".join(parts)


def state(scheduler: Scheduler) -> str:
    """A scheduler in three lines: memory, the running, the waiting."""
    kv, slots = scheduler.kv, scheduler.slots
    running = [
        f"{req.rid}:{length}/{end}"
        for one in slots.running_sets
        for req, length, end in zip(one.reqs, one.lens.tolist(), one.ends.tolist(), strict=True)
    ]
    chunked = "" if slots.chunked is None else f", in part {slots.chunked.rid}:{slots.chunked.kv_len}"
    waiting = [f"{req.rid}:{len(req.tokens)}" for req in islice(scheduler.queue.waiting, 12)]
    more = len(scheduler.queue.waiting) - len(waiting)
    return (
        f"{kv.pool.free} free pages and {kv.available_pages - kv.pool.free} evictable of {kv.pool.total}, "
        f"ratio {scheduler.estimate.new_token_ratio:.4f}, {len(scheduler.flights)} in flight, "
        f"full {slots[0].full}\n"
        f"running (KV/end) {' '.join(running) or 'none'}{chunked}\n"
        f"waiting (tokens) {' '.join(waiting) or 'none'}" + (f" and {more} more" if more > 0 else "")
    )


def _batch(decisions: object, at: int) -> Decision | None:
    assert isinstance(decisions, list)
    return decisions[at] if at < len(decisions) else None


def _written(batch: Decision | None) -> str:
    if batch is None:
        return "nothing more"
    rows = [f"{one}:{count}" if count != 1 else one for one, count in batch.items() if one != RETRACTED]
    return " ".join(rows) + (f" ! {' '.join(batch[RETRACTED])}" if RETRACTED in batch else "")
