"""A modelled GPU that takes stretches of steady decode at once.

While the same requests decode and nothing else happens, every step of a loop is the same few sums. This backend does them
without going through the loop and the scheduler for each: as the loop begins to wait for a batch, it moves everything on to
the last step before something happens. The result is the one of going step by step, to the last bit.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from backends.simulated.backend import MODE_CODES, SimulatedBackend, SimulatedForward
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler
from workbench.scheduler.steady import steady_decode

LOOPS = ("normal", "overlap")
"""Loops that, between two waits for a batch, process it, receive, schedule and launch, in this order."""
LEAST_STEPS = 3
"""Fewer are not worth the trouble."""
MOST_STEPS = 128
_DECODE = MODE_CODES["decode"]


class SteadyOutbox(Protocol):
    """An outbox that takes the results of many steps."""

    def send_steady(self, batch: ScheduleBatch, moments_s: list[float]) -> None: ...


class SteadyBackend(SimulatedBackend):
    """One stage whose loop is one of :data:`LOOPS`."""

    _scheduler: Scheduler | None = None
    _outbox: SteadyOutbox

    def follow(self, scheduler: Scheduler, outbox: SteadyOutbox) -> None:
        """Name the scheduler and the outbox to move on."""
        self._scheduler, self._outbox = scheduler, outbox

    def done(self, forward: SimulatedForward) -> float:
        paid, self._debt_s = self._clock.now_s() + self._debt_s, 0.0
        end = forward.end_s
        wait = end if end > paid else paid
        if self._scheduler is None or forward.batch.num_prefill:
            return wait
        horizon = self._clock.peek()
        step_s = end - forward.starts_s[0]
        ahead = (horizon - wait) / step_s if step_s > 0 else float("inf")
        if ahead < LEAST_STEPS:
            return wait
        return self._move_on(self._scheduler, forward, wait, horizon, int(min(ahead, MOST_STEPS - 1)) + 1)

    def _move_on(
        self, scheduler: Scheduler, forward: SimulatedForward, wait: float, horizon: float, most: int
    ) -> float:
        """Pass at most ``most`` steps that end before ``horizon``. ``wait`` is when the first of them may be processed;
        returns when the one after the last may be."""
        steady = steady_decode(scheduler, most)
        if steady is None or steady.steps < LEAST_STEPS:
            return wait
        tokens = self._sampler.sample_ahead(forward.batch, steady.steps)
        steps = steady.first_stop(tokens)
        if steps < LEAST_STEPS:
            return wait
        host, cost, log, instance = self._host, self._cost.forward, self._log, self._instance
        pending, free_s = self._pending, self._stage_free_s[0]
        # (batch, when its kernels were issued, start, end, CPU phases) of each batch in flight, oldest first.
        flight = deque((f.batch, f.launch_s, f.starts_s[0], f.ends_s[0], f.cpu_s) for f in pending)
        formed: list[ModelWorkerBatch] = []
        moments: list[float] = []
        receive_s = host.receive(0)
        cpu_s: tuple[float, float, float] | None = None
        for batch in steady.batches():
            if cpu_s is None:  # the same requests: the same CPU phases
                schedule_s, process_s = host.schedule(batch), host.process(batch, 0)
                prepare_s, issue_s, graph = host.launch(batch)
                launch_s = prepare_s + issue_s
                cpu_s = receive_s, schedule_s, launch_s
                thought_s = receive_s + schedule_s
            sent = wait + process_s
            if sent >= horizon or len(formed) == steps:
                break
            done, issued, start, end, (done_receive_s, done_schedule_s, done_launch_s) = flight.popleft()
            log(
                done.step, instance, 0, _DECODE, issued, start, end, done.decode_tokens, 0, done.decode_tokens,
                done.context_tokens, done.kv_used_tokens, done.waiting, done.running, done_receive_s, done_schedule_s,
                done_launch_s, process_s,
            )  # fmt: skip
            moments.append(sent)
            prepared = sent + thought_s + prepare_s
            issued = prepared + issue_s
            start = issued if graph else prepared
            if free_s > start:
                start = free_s
            free_s = start + cost(batch)
            if free_s < issued:
                free_s = issued
            flight.append((batch, issued, start, free_s, cpu_s))
            formed.append(batch)
            paid = sent + (thought_s + launch_s)
            end = flight[0][3]
            wait = end if end > paid else paid
            if wait >= horizon:
                break
        if formed:
            self._stage_free_s[0] = free_s
            steady.take(tokens[: len(formed)], formed)
            self._outbox.send_steady(scheduler.state.in_flight[0], moments)
            for one, (batch, issued, start, end, spent) in zip(pending, flight, strict=True):
                one.batch, one.launch_s, one.cpu_s = batch, issued, spent
                one.starts_s, one.ends_s, one.end_s = [start], [end], end
        return wait
