"""The modelled GPU behind an event loop: stages and links in SimPy time.

A stage runs the batches it is given in order, and so does a link; both are queues with one server whose service times are
known at arrival. So a batch's start and end on every stage follow at launch from when each becomes free, and one SimPy
event, at the end, is all a loop waits for.

CPU phases are charged to a debt that passes with the loop's next wait. Nothing the loop does in between depends on the
clock (it has drained its inbox already), so this equals waiting after every phase, at a fraction of the events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import simpy

from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from workbench.scheduler.batch import ModelWorkerBatch

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel

MODE_CODES = {"prefill": 0, "decode": 1, "mixed": 2}


class SimulatedForward:
    """A batch on its way through the stages."""

    __slots__ = ("_sampler", "batch", "cost_s", "end_s", "ends_s", "launch_host_s", "launch_s", "receive_s",
                 "schedule_s", "starts_s")  # fmt: skip

    def __init__(self, batch: ModelWorkerBatch, sampler: ScriptedSampler) -> None:
        self.batch = batch
        self._sampler = sampler
        self.starts_s: list[float] = []
        self.ends_s: list[float] = []
        self.receive_s = self.schedule_s = self.launch_host_s = self.launch_s = self.end_s = 0.0

    def tokens(self) -> np.ndarray:
        return self._sampler.sample(self.batch)


class SimulatedBackend:
    """One instance: a CPU, ``stages`` GPUs in a row (each standing for its tensor-parallel group), and links.

    ``log_iteration`` takes one row of iterations.csv, positional, in the order of its columns.
    """

    def __init__(self, env: simpy.Environment, cost: CostModel, host: HostModel, sampler: ScriptedSampler,
                 log_iteration: Callable[..., None], instance: int = 0, stages: int = 1) -> None:  # fmt: skip
        self._env = env
        self._cost = cost
        self._host = host
        self._sampler = sampler
        self._log = log_iteration
        self._instance = instance
        self._stage_free_s = [0.0] * stages
        self._link_free_s = [0.0] * (stages - 1)
        self._debt_s = 0.0
        self._receive_s = self._schedule_s = self._launch_host_s = 0.0
        self._pending: deque[SimulatedForward] = deque()

    def now_s(self) -> float:
        """The CPU's clock: simulated time and the phases that have yet to pass."""
        return self._env.now + self._debt_s

    def host(self, phase: str, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        if phase == "receive":
            cost = self._host.receive(count)
            self._receive_s += cost
        elif phase == "schedule":
            assert batch is not None
            self._schedule_s = cost = self._host.schedule(batch)
        elif phase == "launch":
            cost = self._launch_host_s
        elif phase == "process":
            assert batch is not None
            cost = self._host.process(batch, count)
            self._write(self._pending.popleft(), cost)
        else:
            raise ValueError(f"unknown CPU phase {phase!r}")
        self._debt_s += cost

    def launch(self, batch: ModelWorkerBatch) -> SimulatedForward:
        host = self._host
        forward = SimulatedForward(batch, self._sampler)
        if batch.new_requests:
            self._sampler.load(batch)
        prepare_s, issue_s, graph = host.launch(batch)
        now = self._env.now + self._debt_s
        issued = now + prepare_s + issue_s
        forward.launch_s = issued
        at = issued if graph else now + prepare_s
        free = self._stage_free_s
        for stage in range(len(free)):
            start = free[stage] if free[stage] > at else at
            end = start + self._cost.forward(batch, stage)
            if end < issued:
                end = issued  # kernels issued one by one: the last cannot end before it was issued
            free[stage] = end
            forward.starts_s.append(start)
            forward.ends_s.append(end)
            if stage < len(self._link_free_s):
                begin = max(end, self._link_free_s[stage])
                self._link_free_s[stage] = at = begin + self._cost.transfer_s(batch, stage)
        forward.end_s = end
        forward.receive_s, forward.schedule_s = self._receive_s, self._schedule_s
        forward.launch_host_s = self._launch_host_s = prepare_s + issue_s
        self._receive_s = self._schedule_s = 0.0
        self._pending.append(forward)
        return forward

    def done(self, forward: SimulatedForward) -> simpy.Event:
        debt, self._debt_s = self._debt_s, 0.0
        left = forward.end_s - self._env.now
        return self._env.timeout(left if left > debt else debt)

    def cpu(self) -> simpy.Event:
        debt, self._debt_s = self._debt_s, 0.0
        return self._env.timeout(debt)

    def _write(self, forward: SimulatedForward, process_s: float) -> None:
        batch = forward.batch
        for stage, start in enumerate(forward.starts_s):
            # The CPU's phases belong to the iteration, not to each stage of it.
            own = (forward.receive_s, forward.schedule_s, forward.launch_host_s, process_s) if stage == 0 else _NO_CPU
            self._log(
                batch.step, self._instance, stage, MODE_CODES[batch.mode], forward.launch_s, start,
                forward.ends_s[stage], batch.num_prefill + batch.decode_tokens, batch.prefill_tokens,
                batch.decode_tokens, batch.context_tokens, batch.kv_used_tokens, batch.waiting, batch.running, *own,
            )  # fmt: skip


_NO_CPU = (0.0, 0.0, 0.0, 0.0)


class SimulatedInbox:
    """Messages between simulated clients and a loop."""

    def __init__(self, env: simpy.Environment, on_drain: Callable[[list[object]], None] | None = None) -> None:
        self._env = env
        self._on_drain = on_drain
        """Told what was drained, when it is."""
        self._messages: list[object] = []
        self._waiting: simpy.Event | None = None

    def put(self, message: object) -> None:
        """Deliver a message now."""
        self._messages.append(message)
        if self._waiting is not None:
            self._waiting.succeed()
            self._waiting = None

    def drain(self) -> list[object]:
        messages = self._messages
        if messages:
            self._messages = []
            if self._on_drain is not None:
                self._on_drain(messages)
        return messages

    def arrival(self) -> simpy.Event:
        if self._messages:
            return self._env.timeout(0)
        if self._waiting is None:
            self._waiting = self._env.event()
        return self._waiting
