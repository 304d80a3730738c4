"""The modelled GPU behind an event loop: stages and links in SimPy time.

A stage runs the batches it is given in order, and so does a link; both are queues with one server whose service times are
known at arrival. So a batch's start and end on every stage follow at launch from when each becomes free, and one moment,
its end, is all a loop waits for.

CPU phases are charged to a debt that passes with the loop's next wait. Nothing the loop does in between depends on the
clock (it has drained its inbox already), so this equals waiting after every phase, at a fraction of the events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import simpy

from backends.simulated.clock import Clock
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from workbench.phase_log import LogIteration, PhaseLog
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel


class SimulatedForward:
    """A batch on its way through the stages."""

    __slots__ = ("_sampler", "batch", "cpu_s", "end_s", "ends_s", "launch_s", "starts_s")

    def __init__(
        self,
        batch: ModelWorkerBatch,
        sampler: ScriptedSampler,
        launch_s: float,
        starts_s: list[float],
        ends_s: list[float],
    ) -> None:
        self.batch = batch
        self._sampler = sampler
        self.launch_s = launch_s
        """When its last kernel was issued to the first stage."""
        self.starts_s = starts_s
        self.ends_s = ends_s
        self.end_s = ends_s[-1] if ends_s else 0.0
        self.cpu_s = (0.0, 0.0, 0.0)

    def output(self) -> StepOutput:
        return self._sampler.sample(self.batch)

    def become(
        self, batch: ModelWorkerBatch, launch_s: float, start_s: float, end_s: float, cpu_s: tuple[float, float, float]
    ) -> None:
        """Stand for another batch, of one stage, from now on."""
        self.batch, self.launch_s, self.cpu_s = batch, launch_s, cpu_s
        self.starts_s, self.ends_s, self.end_s = [start_s], [end_s], end_s


class SimulatedBackend:
    """One instance: a CPU, ``stages`` GPUs in a row (each standing for its tensor-parallel group), and links.

    Its waits are moments of the clock. What is public beside the contract is for whoever skips steps
    (workbench/cluster/skip_ahead.py).
    """

    lock_step = False
    """Whether a step ends for all ranks of a group at once."""

    def __init__(
        self,
        clock: Clock,
        cost: CostModel,
        host: HostModel,
        sampler: ScriptedSampler,
        log_iteration: LogIteration,
        instance: int = 0,
        stages: int = 1,
    ) -> None:
        self._clock = clock
        self.cost = cost
        self.host_model = host
        self.sampler = sampler
        self.phases: PhaseLog[SimulatedForward] = PhaseLog(log_iteration, instance)
        self._stage_free_s = [0.0] * stages
        self._link_free_s = [0.0] * (stages - 1)
        self._debt_s = 0.0
        self._launch_host_s = 0.0
        self.awaited: SimulatedForward | None = None
        """The batch whose result the CPU waits for; None while it waits for something else."""

    def now_s(self) -> float:
        """The CPU's clock: simulated time and the phases that have yet to pass."""
        return self._clock.now_s() + self._debt_s

    def host(self, phase: str, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        if phase == "receive":
            cost = self.host_model.receive(count)
            self.phases.receive_s += cost
        elif phase == "launch":
            cost = self._launch_host_s
        elif phase == "schedule":
            assert batch is not None
            cost = self.host_model.schedule(batch)
            self.phases.schedule_s += cost
        elif phase == "process":
            assert batch is not None
            cost = self.host_model.process(batch, count)
            self.phases.processed(cost)
        else:
            raise ValueError(f"unknown CPU phase {phase!r}")
        self._debt_s += cost

    def launch(self, batch: ModelWorkerBatch) -> SimulatedForward:
        if batch.new_requests:
            self.sampler.load(batch)
        prepare_s, issue_s, graph = self.host_model.launch(batch)
        prepared = self._clock.now_s() + self._debt_s + prepare_s
        issued = prepared + issue_s
        free = self._stage_free_s
        if len(free) == 1:
            start = issued if graph else prepared
            if free[0] > start:
                start = free[0]
            end = start + self.cost.forward(batch)
            if end < issued:
                end = issued  # kernels issued one by one: the last cannot end before it was issued
            free[0] = end
            starts, ends = [start], [end]
        else:
            starts, ends = self._through_stages(batch, issued if graph else prepared, issued)
        self._launch_host_s = prepare_s + issue_s
        forward = SimulatedForward(batch, self.sampler, issued, starts, ends)
        self.phases.launched(forward, self._launch_host_s)
        return forward

    def _through_stages(self, batch: ModelWorkerBatch, at: float, issued: float) -> tuple[list[float], list[float]]:
        starts, ends = [], []
        for stage, free in enumerate(self._stage_free_s):
            start = max(free, at)
            end = max(start + self.cost.forward(batch, stage), issued)
            self._stage_free_s[stage] = end
            starts.append(start)
            ends.append(end)
            if stage < len(self._link_free_s):
                begin = max(end, self._link_free_s[stage])
                self._link_free_s[stage] = at = begin + self.cost.transfer_s(batch, stage)
        return starts, ends

    def done(self, forward: SimulatedForward) -> float:
        paid, self._debt_s = self._clock.now_s() + self._debt_s, 0.0
        self.awaited = forward
        end = forward.end_s
        return end if end > paid else paid

    def cpu(self) -> float:
        paid, self._debt_s = self._clock.now_s() + self._debt_s, 0.0
        self.awaited = None
        return paid

    @property
    def stages(self) -> int:
        return len(self._stage_free_s)

    @property
    def free_s(self) -> float:
        """When the first stage is free for another batch."""
        return self._stage_free_s[0]

    @free_s.setter
    def free_s(self, moment_s: float) -> None:
        self._stage_free_s[0] = moment_s


class SimulatedInbox:
    """Messages between simulated clients and a loop."""

    def __init__(self, clock: Clock, on_drain: Callable[[list[object]], None] | None = None) -> None:
        self._clock = clock
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

    def arrival(self) -> simpy.Event | float:
        if self._messages:
            return self._clock.now_s()
        if self._waiting is None:
            self._waiting = self._clock.event()
        return self._waiting
