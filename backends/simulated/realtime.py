"""The modelled GPU in real time: the same stages, links and costs as in simulation, against the monotonic clock.

The scheduler's CPU time is real here and passes by itself, so only GPU and link times are modelled, stretched by
``time_scale``. CPU phases are measured (this thread's CPU time, waits not counted) and logged as in any live run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from backends.simulated.copies import CopyEngine
from backends.simulated.gpus import ModelledForward, ModelledGPUs
from backends.simulated.synthetic import SyntheticSampler
from workbench.backend import Phase, Wait
from workbench.phase_log import LogIteration, MeasuredPhases
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel


class RealtimeForward(ModelledForward):
    """A batch on its way whose sampler looks at masks."""

    __slots__ = ("masks",)

    masks: np.ndarray | None

    def output(self) -> StepOutput:
        output = super().output()
        if self.batch.masked is not None and self.masks is not None:
            self._sampler.constrain(self.batch, output.tokens, self.masks)  # type: ignore[attr-defined]
        return output


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
        copies: CopyEngine | None = None,
    ) -> None:
        self._sampler = sampler
        self.phases: MeasuredPhases[ModelledForward] = MeasuredPhases(log_iteration, clock=time.thread_time)
        self._now_s = now_s
        self.gpus = ModelledGPUs(cost, stages, copies, time_scale)
        self._busy_with: ModelledForward | None = None

    def host(self, phase: Phase, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        self.phases.note(phase)

    def launch(self, batch: ModelWorkerBatch) -> ModelledForward:
        if batch.new_requests:
            self._sampler.load(batch)
        at = self._now_s()
        forward = RealtimeForward(batch, self._sampler, at, [], [])
        self.gpus.run(forward, at, at)
        self._busy_with = self.phases.launching = forward
        return forward

    def sample(self, forward: ModelledForward, masks: np.ndarray | None = None) -> None:
        assert isinstance(forward, RealtimeForward)
        forward.masks = masks
        self.gpus.sample(forward, self._now_s())
        self.phases.rested()  # what it took to make the masks is no phase of an iteration

    def copied(self, forward: ModelledForward) -> Wait:
        return self._until(forward.copied_s) if forward.batch.kv_copies else None

    def done(self, forward: ModelledForward) -> Wait:
        return self._until(forward.end_s)

    def _until(self, moment_s: float) -> Wait:
        def wait() -> None:
            while (left_s := moment_s - self._now_s()) > 0:
                time.sleep(left_s)
            self.phases.rested()

        return wait

    def worked_s(self) -> float:
        """The clock while a launched batch computes; it stands at the end of the last one."""
        now_s = self._now_s()
        return min(now_s, self._busy_with.end_s) if self._busy_with is not None else 0.0

    def cpu(self) -> Wait:
        return None  # real CPU time has passed already

    def rested(self) -> None:
        """The CPU has waited for something else than a batch."""
        self.phases.rested()
