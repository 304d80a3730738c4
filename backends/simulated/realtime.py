"""The modelled GPU in real time: the same stages, links and costs as in simulation, against the monotonic clock.

The scheduler's CPU time is real here and passes by itself, so only GPU and link times are modelled, stretched by
``time_scale``. CPU phases are measured (this thread's CPU time, waits not counted) and logged as in any live run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from backends.simulated.synthetic import SyntheticSampler
from workbench.backend import Phase, Wait
from workbench.phase_log import LogIteration, MeasuredPhases
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel


class RealtimeForward:
    """A batch on its way through the stages. Times are seconds of the backend's clock."""

    __slots__ = ("_sampler", "batch", "cpu_s", "end_s", "ends_s", "launch_s", "starts_s")

    def __init__(self, batch: ModelWorkerBatch, sampler: SyntheticSampler, launch_s: float) -> None:
        self.batch = batch
        self._sampler = sampler
        self.launch_s = self.end_s = launch_s
        self.starts_s: list[float] = []
        self.ends_s: list[float] = []
        self.cpu_s = (0.0, 0.0, 0.0)

    def output(self) -> StepOutput:
        return self._sampler.sample(self.batch)


class RealtimeBackend:
    """The one instance of a server, in real time.

    ``now_s`` is the clock of the iteration log; ``time_scale`` is real seconds per modelled second: 1 is the modelled
    GPU's own speed, 0.1 is ten times as fast, 0 does not wait at all.
    """

    def __init__(
        self,
        cost: CostModel,
        sampler: SyntheticSampler,
        log_iteration: LogIteration,
        now_s: Callable[[], float],
        time_scale: float = 1.0,
        stages: int = 1,
    ) -> None:
        self._cost = cost
        self._sampler = sampler
        self.phases: MeasuredPhases[RealtimeForward] = MeasuredPhases(log_iteration, clock=time.thread_time)
        self._now_s = now_s
        self._scale = time_scale
        self._stage_free_s = [0.0] * stages
        self._link_free_s = [0.0] * (stages - 1)
        self._busy_until_s = 0.0

    def host(self, phase: Phase, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        self.phases.note(phase)

    def launch(self, batch: ModelWorkerBatch) -> RealtimeForward:
        if batch.new_requests:
            self._sampler.load(batch)
        at = self._now_s()
        forward = RealtimeForward(batch, self._sampler, at)
        for stage, free_s in enumerate(self._stage_free_s):
            start = max(free_s, at)
            end = start + self._cost.forward(batch, stage) * self._scale
            self._stage_free_s[stage] = end
            forward.starts_s.append(start)
            forward.ends_s.append(end)
            if stage < len(self._link_free_s):
                begin = max(end, self._link_free_s[stage])
                self._link_free_s[stage] = at = begin + self._cost.transfer_s(batch, stage) * self._scale
        forward.end_s = self._busy_until_s = forward.ends_s[-1]
        self.phases.launching = forward
        return forward

    def done(self, forward: RealtimeForward) -> Wait:
        def wait() -> None:
            while (left_s := forward.end_s - self._now_s()) > 0:
                time.sleep(left_s)
            self.phases.rested()

        return wait

    def worked_s(self) -> float:
        """The clock while a launched batch computes; it stands at the end of the last one."""
        return min(self._now_s(), self._busy_until_s)

    def cpu(self) -> Wait:
        return None  # real CPU time has passed already

    def rested(self) -> None:
        """The CPU has waited for something else than a batch."""
        self.phases.rested()
