"""The modelled GPUs of one instance: a batch on its way through stages and links, and the copies beside it."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Protocol

from backends.simulated.copies import CopyEngine
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

if TYPE_CHECKING:
    from backends.simulated.cost import CostModel


class Sampler(Protocol):
    """Source of tokens, as there is no model."""

    def load(self, batch: ModelWorkerBatch) -> None:
        """Take in the requests that start in a batch."""
        ...

    def sample(self, batch: ModelWorkerBatch) -> StepOutput:
        """Sample a batch. A mask constrains nothing that a sampler without a model can know."""
        ...


class ModelledForward:
    """A batch on its way. Times are those of the backend's clock."""

    __slots__ = ("_sampler", "batch", "computed_s", "copied_s", "cpu_s", "end_s", "ends_s", "launch_s", "starts_s")

    def __init__(
        self, batch: ModelWorkerBatch, sampler: Sampler, launch_s: float, starts_s: list[float], ends_s: list[float]
    ) -> None:
        self.batch = batch
        self._sampler = sampler
        self.launch_s = launch_s
        """When its last kernel was issued to the first stage."""
        self.starts_s = starts_s
        self.ends_s = ends_s
        self.end_s = ends_s[-1] if ends_s else inf
        """Of the last stage; infinite while nobody knows."""
        self.cpu_s: tuple[float, float, float]
        # Set where they are needed, as most batches need neither:
        self.computed_s: float
        """Of a batch with masked rows: when its logits are there."""
        self.copied_s: float
        """Of a batch with copies: when the last one is made."""

    def output(self) -> StepOutput:
        assert self.end_s < inf, "a batch with masked rows samples in a second phase, which comes first"
        return self._sampler.sample(self.batch)

    def become(
        self, batch: ModelWorkerBatch, launch_s: float, start_s: float, end_s: float, cpu_s: tuple[float, float, float]
    ) -> None:
        """Stand for another batch, of one stage, from now on."""
        self.batch, self.launch_s, self.cpu_s = batch, launch_s, cpu_s
        self.starts_s, self.ends_s, self.end_s = [start_s], [end_s], end_s


class ModelledGPUs:
    """Stages in a row, each standing for its tensor-parallel group, and the links between them.

    A stage runs the batches it is given in order, and so does a link: both are queues with one server whose service times
    are known at arrival, so a batch's start and end on every stage follow at launch from when each becomes free. A batch
    with masked rows holds the last stage until it has been sampled. ``scale``: seconds of the clock per modelled second.
    """

    def __init__(self, cost: CostModel, stages: int, copies: CopyEngine | None = None, scale: float = 1.0) -> None:
        self._cost, self._copies, self._scale = cost, copies, scale
        self.stage_free_s = [0.0] * stages
        self.link_free_s = [0.0] * (stages - 1)

    def run(self, forward: ModelledForward, ready_s: float, issued_s: float) -> None:
        """Begin with a batch, which may start at ``ready_s`` and cannot end before its last kernel was issued. Its copies
        begin before it at ``ready_s``, too."""
        batch, cost, scale = forward.batch, self._cost, self._scale
        at_s = ready_s
        if batch.kv_copies:
            at_s = self.copies_of(batch).before(batch.kv_copies, ready_s, self.stage_free_s[-1])
        for stage, free_s in enumerate(self.stage_free_s):
            assert free_s < inf, "a batch with masked rows is sampled before the next one is launched"
            start_s = max(free_s, at_s)
            end_s = max(start_s + cost.forward(batch, stage) * scale, issued_s)
            self.stage_free_s[stage] = end_s
            forward.starts_s.append(start_s)
            forward.ends_s.append(end_s)
            if stage < len(self.link_free_s):
                begin_s = max(end_s, self.link_free_s[stage])
                self.link_free_s[stage] = at_s = begin_s + cost.transfer_s(batch, stage) * scale
        if batch.masked is None:
            self.finish(forward, forward.ends_s[-1])
        else:
            forward.computed_s = max(forward.ends_s[-1] - self.sampling_s(batch), forward.starts_s[-1])
            self.stage_free_s[-1] = forward.ends_s[-1] = inf

    def sample(self, forward: ModelledForward, masked_s: float) -> None:
        """Sample a batch with masked rows, whose masks are there at ``masked_s``."""
        assert forward.batch.masked is not None and forward.end_s == inf, "there is nothing left to sample"
        end_s = max(forward.computed_s, masked_s) + self.sampling_s(forward.batch)
        self.stage_free_s[-1] = forward.ends_s[-1] = end_s
        self.finish(forward, end_s)

    def finish(self, forward: ModelledForward, end_s: float) -> None:
        """Note when a batch ends, and begin with the copies after it."""
        forward.end_s = end_s
        copies = forward.batch.kv_copies
        if copies:
            forward.copied_s = self.copies_of(forward.batch).after(copies, end_s)

    def sampling_s(self, batch: ModelWorkerBatch) -> float:
        """Tell how many of a step's seconds come after the masks are needed. A cost model may tell them."""
        told = getattr(self._cost, "sampling_s", None)
        return 0.0 if told is None else told(batch) * self._scale

    def copies_of(self, batch: ModelWorkerBatch) -> CopyEngine:
        """Return what makes the copies of a batch. Raises ValueError where nothing does."""
        if self._copies is None:
            raise ValueError(
                f"kv_copies: batch {batch.step} has copies, and this instance was given no way to make them"
            )
        return self._copies
