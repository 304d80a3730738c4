"""Skip the steps of a simulated instance that are decided already.

While the same requests decode and nothing else happens, every step of a loop is the same few sums. So whenever a loop waits
for a batch, what sends it on (:meth:`Clock.run_loop`) asks :meth:`SkipAhead.skip`, which moves scheduler, modelled GPU and
record on to the last step before something happens, and says until when the loop waits then. Loops and backends know
nothing of it, and what is left behind is the same to the last bit as going step by step (``--exact``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from operator import add, lt
from typing import Any, Protocol

from backends.simulated.backend import SimulatedBackend
from backends.simulated.clock import Clock
from backends.simulated.gpus import ModelledForward
from workbench.instance import Recipe
from workbench.scheduler.decided import MOST_STEPS, decided_steps
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult

LEAST_STEPS = 3
"""Fewer are not worth the trouble."""


def can_skip(recipe: Recipe, backend: SimulatedBackend) -> bool:
    """Tell whether steps of such an instance can be skipped.

    The sums below are those of a loop that, between two waits for a batch, processes it, receives, schedules and launches,
    in this order; and of one stage whose steps end when the cost model says, not when other ranks have joined in.
    """
    decodes = recipe.role != "prefill"
    return decodes and recipe.loop.name in ("normal", "overlap") and backend.stages == 1 and not backend.lock_step


class ManyStepsOutbox(Protocol):
    """An outbox that takes many steps at once."""

    def send(self, result: StepResult, now: float) -> None:
        """A result that was sent at ``now``."""
        ...

    def scheduled_decodes(self, newest: ScheduleBatch, kv_used_tokens: Sequence[int]) -> None:
        """As many decode batches of the same requests have been launched as there are numbers of KV tokens held with
        them, the last one ``newest``."""
        ...

    def send_decodes(self, batch: ScheduleBatch, moments_s: list[float]) -> None:
        """At each of these moments the result of a decode batch of the same requests was sent, of which none ends.
        ``batch`` is one like them."""
        ...


class IterationTable(Protocol):
    """Where the backend's rows of iterations.csv go (:class:`IterationLog`)."""

    def go_on(
        self,
        launch_s: Sequence[float],
        start_s: Sequence[float],
        end_s: Sequence[float],
        kv_used_tokens: Sequence[int],
    ) -> None:
        """Add those of the decode steps after the last row's."""
        ...


@dataclass(slots=True)
class Timeline:
    """Moments of the batches in flight, oldest first, and of those formed after them."""

    issued_s: list[float]
    """When the last kernel of each was issued."""
    start_s: list[float]
    end_s: list[float]
    sent_s: list[float]
    """When the result of each was sent, of as many as are processed: at each moment another one is formed."""
    processable_s: float
    """When the result after those may be processed."""


class SkipAhead:
    """Skips decided steps of one instance for which :func:`can_skip` holds."""

    def __init__(
        self,
        clock: Clock,
        scheduler: Scheduler,
        backend: SimulatedBackend,
        outbox: ManyStepsOutbox,
        iterations: IterationTable,
    ) -> None:
        self._clock = clock
        self._scheduler = scheduler
        self._backend = backend
        self._outbox = outbox
        self._iterations = iterations
        self._decodes = getattr(backend.cost, "decodes", None)
        self.steps = 0
        """Skipped so far."""

    def skip(self, wait: Any) -> Any:
        """Take the steps that are decided, if the loop waits for a batch; ``wait`` is what it waits for. Returns what it
        waits for after those steps."""
        forward = self._backend.awaited
        if forward is None:
            return wait
        horizon_s = self._clock.peek()
        # A guess: the steps to come are decodes, each about as long as the newest.
        newest = self._backend.phases.pending[-1] if forward.batch.num_prefill else forward
        if newest.end_s == inf:
            return wait  # it waits for masks
        step_s = newest.end_s - newest.starts_s[0]
        ahead = (horizon_s - wait) / step_s if step_s > 0 else inf
        if ahead < LEAST_STEPS:
            return wait
        return self._take_steps(wait, horizon_s, int(min(ahead, MOST_STEPS - 1)) + 1)

    def _take_steps(self, processable_s: float, horizon_s: float, most: int) -> float:
        """Take at most ``most`` steps that end before ``horizon_s``. At ``processable_s`` the result of the oldest batch in
        flight may be processed; returns when that of the oldest afterwards may be."""
        scheduler, backend, outbox = self._scheduler, self._backend, self._outbox
        pending = list(backend.phases.pending)
        if len(pending) < len(scheduler.flights):
            return processable_s  # a batch is formed, and not to be launched before the result of this one
        decided = decided_steps(scheduler, most)
        if decided is None:
            return processable_s
        others = len(decided.others)
        least = max(LEAST_STEPS, others)
        if decided.steps < least:
            return processable_s
        tokens = backend.sampler.sample(decided.oldest, decided.steps - others).tokens
        steps = decided.first_stop(tokens) + others
        if steps < least:
            return processable_s
        outputs = [one.output() for one in pending[:others]]
        if decided.others_end(outputs):
            return processable_s
        # Once the batches of other requests are processed the requests stay the same, and so do the CPU phases.
        host, like = backend.host_model, decided.newest
        processes_s = [host.process(one.batch, 0) for one in pending[:others]]
        processes_s += [host.process(like, 0)] * (steps - others)
        phases_s = host.receive(0), host.schedule(like), *host.launch(like)
        gpu_s = None
        if self._decodes is not None and (gpu_s := self._decodes(like, steps + decided.launched)) is not None:
            gpu_s = gpu_s[decided.launched :]  # the newest has been launched already
        if gpu_s is None:
            gpu_s = [backend.cost.forward(decided.batch(ahead)) for ahead in range(steps)]
        times = timeline(pending, backend.free_s, gpu_s, processes_s, phases_s, processable_s, horizon_s)
        formed = len(times.sent_s)
        if formed < max(others, 1):
            return processable_s
        # So far nothing has been changed. From here on scheduler, record and GPU move on.
        for one, process_s in zip(pending[:formed], processes_s, strict=False):
            backend.phases.processed(one, process_s)
        for number, output in enumerate(outputs):
            outbox.send(decided.process_other(number, output), times.sent_s[number])
        cpu_s = phases_s[0], phases_s[1], phases_s[2] + phases_s[3]
        kv_used_tokens = decided.kv_used_tokens(formed)
        alone = len(pending)
        if alone < formed:  # batches that are both formed and processed
            first = ModelledForward(
                decided.batch(0), backend.sampler, times.issued_s[alone], [times.start_s[alone]], [times.end_s[alone]]
            )
            first.cpu_s = cpu_s
            backend.phases.processed(first, processes_s[-1])
            after = slice(alone + 1, formed)
            used = kv_used_tokens[1 : formed - alone]
            self._iterations.go_on(times.issued_s[after], times.start_s[after], times.end_s[after], used)
        decided.take(tokens, formed)
        in_flight = scheduler.flights
        outbox.scheduled_decodes(in_flight[-1], kv_used_tokens)
        if formed > others:
            outbox.send_decodes(in_flight[0], times.sent_s[others:])
        cpus_s = [one.cpu_s for one in pending] + [cpu_s] * formed
        for at, (one, batch) in enumerate(zip(pending, in_flight, strict=True), start=formed):
            # The loop holds the forward and goes on with it: it becomes the one that is now in its place.
            one.become(batch.worker, times.issued_s[at], times.start_s[at], times.end_s[at], cpus_s[at])
        backend.free_s = times.end_s[-1]
        self.steps += formed
        return times.processable_s


def timeline(
    pending: Sequence[ModelledForward],
    free_s: float,
    gpu_s: Sequence[float],
    processes_s: Sequence[float],
    phases_s: tuple[float, float, float, float, bool],
    processable_s: float,
    horizon_s: float,
) -> Timeline:
    """Do the sums of the normal and the overlap loop for as many steps as there are ``gpu_s``, or up to ``horizon_s``.

    ``pending`` are the batches in flight; from ``free_s`` on the GPU is free for another, and from ``processable_s`` on the
    oldest may be processed. ``processes_s`` is what that takes at each of the steps; ``phases_s`` are receive, schedule, and
    launch before and after the first kernel, and whether a graph is replayed.
    """
    receive_s, schedule_s, prepare_s, issue_s, graph = phases_s
    thought_s = receive_s + schedule_s
    all_s = thought_s + (prepare_s + issue_s)
    issued_s = [one.launch_s for one in pending]
    start_s, end_s = [one.starts_s[0] for one in pending], [one.end_s for one in pending]

    if len(pending) > 1:
        # Most often the GPU never waits for the CPU: a batch starts when the one before it ends, and nothing has to be
        # asked from step to step.
        free = len(pending) - 1
        busy_s = [*end_s[:free], *accumulate(gpu_s, initial=free_s)]
        waits_s = [processable_s, *busy_s[1:]]
        sent_s = list(map(add, waits_s, processes_s))
        # With a nanosecond to spare, for sums in another order end in other digits.
        if all(map(lt, [sent + (all_s + 1e-9) for sent in sent_s], waits_s[1:])):
            formed = bisect_left(sent_s, horizon_s)
            del sent_s[formed:]
            issued_s += [sent + thought_s + prepare_s + issue_s for sent in sent_s]
            start_s += busy_s[free : free + formed]
            return Timeline(issued_s, start_s, busy_s[: free + 1 + formed], sent_s, waits_s[formed])

    sent_s = []
    for seconds, process_s in zip(gpu_s, processes_s, strict=True):
        sent = processable_s + process_s
        if sent >= horizon_s:
            break
        sent_s.append(sent)
        prepared = sent + thought_s + prepare_s
        issued = prepared + issue_s
        start = issued if graph else prepared
        if free_s > start:
            start = free_s
        free_s = start + seconds
        if free_s < issued:
            free_s = issued
        issued_s.append(issued)
        start_s.append(start)
        end_s.append(free_s)
        paid, end = sent + all_s, end_s[len(sent_s)]
        processable_s = end if end > paid else paid
        if processable_s >= horizon_s:
            break
    return Timeline(issued_s, start_s, end_s, sent_s, processable_s)
