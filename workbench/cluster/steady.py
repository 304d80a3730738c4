"""A modelled GPU that takes stretches of steady decode at once.

While the same requests decode and nothing else happens, every step of a loop is the same few sums. This backend does them
without going through the loop and the scheduler for each: as the loop begins to wait for a batch, it moves everything on to
the last step before something happens. The result is the one of going step by step, to the last bit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add, lt
from typing import Protocol

from backends.simulated.backend import SimulatedBackend, SimulatedForward
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.scheduler.steady import MOST_STEPS, SteadyDecode, steady_decode

LOOPS = ("normal", "overlap")
"""Loops that, between two waits for a batch, process it, receive, schedule and launch, in this order."""
LEAST_STEPS = 3
"""Fewer are not worth the trouble."""


class SteadyOutbox(Protocol):
    """An outbox that takes the results of many steps."""

    def note(self, result: StepResult, now: float) -> None: ...

    def send_steady(self, batch: ScheduleBatch, moments_s: list[float]) -> None: ...


class LogDecodes(Protocol):
    """Takes the rows of iterations.csv of consecutive decode steps (:meth:`IterationLog.append_decodes`)."""

    def __call__(
        self,
        iteration: int,
        instance: int,
        requests: int,
        context_tokens: int,
        waiting: int,
        running: int,
        cpu_s: tuple[float, ...],
        launch_s: Sequence[float],
        start_s: Sequence[float],
        end_s: Sequence[float],
        kv_used_tokens: Sequence[int],
    ) -> None: ...


@dataclass(slots=True)
class _Times:
    """Moments of the batches in flight, and then of those ahead."""

    issued_s: list[float]
    """When the last kernel of each was issued."""
    start_s: list[float]
    end_s: list[float]
    sent_s: list[float]
    """When the result of the oldest was sent, of the next one, and so on: one for each of those ahead."""
    wait: float
    """When the result after those may be processed."""


class SteadyBackend(SimulatedBackend):
    """One stage whose loop is one of :data:`LOOPS`."""

    _scheduler: Scheduler | None = None
    _outbox: SteadyOutbox
    _log_decodes: LogDecodes

    def follow(self, scheduler: Scheduler, outbox: SteadyOutbox, log_decodes: LogDecodes) -> None:
        """Name the scheduler and the outbox to move on, and where many iterations are logged."""
        self._scheduler, self._outbox, self._log_decodes = scheduler, outbox, log_decodes
        self._decodes = getattr(self._cost, "decodes", None)

    def done(self, forward: SimulatedForward) -> float:
        paid, self._debt_s = self._clock.now_s() + self._debt_s, 0.0
        end = forward.end_s
        wait = end if end > paid else paid
        if self._scheduler is None:
            return wait
        horizon = self._clock.peek()
        # A guess: the steps to come are decodes, each about as long as the newest.
        newest = self._pending[-1] if forward.batch.num_prefill else forward
        step_s = newest.end_s - newest.starts_s[0]
        ahead = (horizon - wait) / step_s if step_s > 0 else float("inf")
        if ahead < LEAST_STEPS:
            return wait
        return self._move_on(self._scheduler, wait, horizon, int(min(ahead, MOST_STEPS - 1)) + 1)

    def _move_on(self, scheduler: Scheduler, wait: float, horizon: float, most: int) -> float:
        """Pass at most ``most`` steps that end before ``horizon``. ``wait`` is when the first of them may be processed;
        returns when the one after the last may be."""
        if len(self._pending) < len(scheduler.state.in_flight):
            return wait  # a batch is formed, and not to be launched before the result of this one
        steady = steady_decode(scheduler, most)
        if steady is None:
            return wait
        others, least = len(steady.others), max(LEAST_STEPS, len(steady.others))
        if steady.steps < least:
            return wait
        tokens = self._sampler.sample_ahead(steady.epoch, steady.rows, steady.first_lens, steady.steps - others)
        steps = steady.first_stop(tokens) + others
        if steps < least:
            return wait
        host, pending = self._host, list(self._pending)
        outputs = [one.output() for one in pending[:others]]
        if steady.others_end(outputs):
            return wait
        # Once the batches of other requests are processed the requests stay the same, and so do the CPU phases.
        last = steady.last
        processes_s = [host.process(one.batch, 0) for one in pending[:others]]
        processes_s += [host.process(last, 0)] * (steps - others)
        cpu_s = host.receive(0), host.schedule(last), *host.launch(last)
        times = self._times(self._seconds(steady, last, steps), processes_s, cpu_s, wait, horizon)
        formed = len(times.sent_s)
        if formed < max(others, 1):
            return wait
        for one, process_s in zip(pending[:formed], processes_s, strict=False):
            self._write(one, process_s)
        for number, output in enumerate(outputs):
            self._outbox.note(steady.process_other(number, output), times.sent_s[number])
        phases_s = cpu_s[0], cpu_s[1], cpu_s[2] + cpu_s[3]
        ahead = slice(len(pending), formed)
        if formed > len(pending):
            self._log_decodes(
                last.step + 1,
                self._instance,
                last.decode_tokens,
                last.context_tokens + last.decode_tokens,
                last.waiting,
                steady.running,
                (*phases_s, processes_s[-1]),
                times.issued_s[ahead],
                times.start_s[ahead],
                times.end_s[ahead],
                steady.used_tokens(formed - len(pending)),
            )
        steady.take(tokens[: formed - others], formed)
        if formed > others:
            self._outbox.send_steady(scheduler.state.in_flight[0], times.sent_s[others:])
        cpus_s = [one.cpu_s for one in pending] + [phases_s] * formed
        for at, (one, flight) in enumerate(zip(pending, scheduler.state.in_flight, strict=True), start=formed):
            one.batch, one.launch_s, one.cpu_s = flight.worker, times.issued_s[at], cpus_s[at]
            one.starts_s, one.ends_s, one.end_s = [times.start_s[at]], [times.end_s[at]], times.end_s[at]
        self._stage_free_s[0] = times.end_s[-1]
        return times.wait

    def _times(
        self,
        gpu_s: list[float],
        processes_s: list[float],
        cpu_s: tuple[float, float, float, float, bool],
        wait: float,
        horizon: float,
    ) -> _Times:
        """The sums of the normal and the overlap loop for as many steps as there are ``gpu_s``, or up to ``horizon``.

        ``processes_s`` are what it takes to process the oldest batch at each of them, ``cpu_s`` the other phases: receive,
        schedule, and launch before and after the first kernel, and whether a graph is replayed.
        """
        receive_s, schedule_s, prepare_s, issue_s, graph = cpu_s
        thought_s = receive_s + schedule_s
        all_s = thought_s + (prepare_s + issue_s)
        pending, free_s = self._pending, self._stage_free_s[0]
        issues = [one.launch_s for one in pending]
        starts, ends_s = [one.starts_s[0] for one in pending], [one.end_s for one in pending]

        if len(pending) > 1:
            # Most often the GPU never waits for the CPU: a batch starts when the one before it ends, and nothing has to be
            # asked from step to step.
            free = len(pending) - 1
            busy_s = [*ends_s[:free], *accumulate(gpu_s, initial=free_s)]
            waits = [wait, *busy_s[1:]]
            moments = list(map(add, waits, processes_s))
            # With a nanosecond to spare, for sums in another order end in other digits.
            if all(map(lt, [sent + (all_s + 1e-9) for sent in moments], waits[1:])):
                formed = bisect_left(moments, horizon)
                del moments[formed:]
                issues += [sent + thought_s + prepare_s + issue_s for sent in moments]
                starts += busy_s[free : free + formed]
                return _Times(issues, starts, busy_s[: free + 1 + formed], moments, waits[formed])

        moments = []
        for seconds, process_s in zip(gpu_s, processes_s, strict=True):
            sent = wait + process_s
            if sent >= horizon:
                break
            moments.append(sent)
            prepared = sent + thought_s + prepare_s
            issued = prepared + issue_s
            start = issued if graph else prepared
            if free_s > start:
                start = free_s
            free_s = start + seconds
            if free_s < issued:
                free_s = issued
            issues.append(issued)
            starts.append(start)
            ends_s.append(free_s)
            paid, end = sent + all_s, ends_s[len(moments)]
            wait = end if end > paid else paid
            if wait >= horizon:
                break
        return _Times(issues, starts, ends_s, moments, wait)

    def _seconds(self, steady: SteadyDecode, last: ModelWorkerBatch, steps: int) -> list[float]:
        """GPU time of the batches after ``last``, one after the other."""
        seconds = self._decodes(last, steps) if self._decodes is not None else None
        return seconds or [self._cost.forward(steady.batch(ahead)) for ahead in range(steps)]
