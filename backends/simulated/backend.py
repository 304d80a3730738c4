"""The modelled GPU behind an event loop: stages and links in SimPy time.

A batch's start and end on every stage follow at its launch (backends/simulated/gpus.py), so one moment, its end, is all a
loop waits for.

CPU phases are charged to a debt that passes with the loop's next wait. Nothing the loop does in between depends on the
clock (it has drained its inbox already), so this equals waiting after every phase, at a fraction of the events.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import simpy

from backends.simulated.clock import Clock
from backends.simulated.copies import CopyEngine
from backends.simulated.gpus import ModelledForward, ModelledGPUs
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from workbench.phase_log import LogIteration, PhaseLog
from workbench.scheduler.batch import ModelWorkerBatch

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel


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
        copies: CopyEngine | None = None,
    ) -> None:
        """``copies``: makes the KV copies of batches; None: they have none."""
        self._clock, self._now_s = clock, clock.now_s
        self.cost = cost
        self.host_model = host
        self.sampler = sampler
        self.phases: PhaseLog[ModelledForward] = PhaseLog(log_iteration, instance)
        self.gpus = ModelledGPUs(cost, stages, copies)
        self._debt_s = 0.0
        self._launch_host_s = 0.0
        self.awaited: ModelledForward | None = None
        """The batch whose result the CPU waits for; None while it waits for something else."""

    def now_s(self) -> float:
        """The CPU's clock: simulated time and the phases that have yet to pass."""
        return self._now_s() + self._debt_s

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
            phases = self.phases
            phases.processed(phases.pending.popleft(), cost)
        else:
            raise ValueError(f"unknown CPU phase {phase!r}")
        self._debt_s += cost

    def launch(self, batch: ModelWorkerBatch) -> ModelledForward:
        if batch.new_requests:
            self.sampler.load(batch)
        prepare_s, issue_s, graph = self.host_model.launch(batch)
        prepared = self._now_s() + self._debt_s + prepare_s
        issued = prepared + issue_s
        free = self.gpus.stage_free_s
        if len(free) > 1 or batch.kv_copies or batch.masked is not None:
            forward = ModelledForward(batch, self.sampler, issued, [], [])
            self.gpus.run(forward, issued if graph else prepared, issued)
        else:
            # The same for one stage: nearly every batch is of this kind.
            start = issued if graph else prepared
            if free[0] > start:
                start = free[0]
                assert start < inf, "a batch with masked rows is sampled before the next one is launched"
            end = start + self.cost.forward(batch)
            if end < issued:
                end = issued
            free[0] = end
            forward = ModelledForward(batch, self.sampler, issued, [start], [end])
        self._launch_host_s = prepare_s + issue_s
        self.phases.launched(forward, self._launch_host_s)
        return forward

    def sample(self, forward: ModelledForward, masks: np.ndarray | None = None) -> None:
        assert forward.batch.masked is not None
        self._debt_s += self.host_model.mask_s * len(forward.batch.masked)
        self.gpus.sample(forward, self.now_s())

    def copied(self, forward: ModelledForward) -> float:
        paid = self.cpu()
        return max(forward.copied_s, paid) if forward.batch.kv_copies else paid

    def done(self, forward: ModelledForward) -> float:
        paid, self._debt_s = self._now_s() + self._debt_s, 0.0
        self.awaited = forward
        end = forward.end_s
        return end if end > paid else paid

    def cpu(self) -> float:
        paid, self._debt_s = self._now_s() + self._debt_s, 0.0
        self.awaited = None
        return paid

    @property
    def stages(self) -> int:
        return len(self.gpus.stage_free_s)

    @property
    def free_s(self) -> float:
        """Moment from which the first stage is free for another batch."""
        return self.gpus.stage_free_s[0]

    @free_s.setter
    def free_s(self, moment_s: float) -> None:
        self.gpus.stage_free_s[0] = moment_s


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

    @property
    def waiting(self) -> int:
        """How many messages nobody has taken yet."""
        return len(self._messages)

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
