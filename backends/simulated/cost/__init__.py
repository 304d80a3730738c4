"""Times of batches on modelled GPUs."""

from __future__ import annotations

from typing import Protocol

from workbench.scheduler.batch import ModelWorkerBatch


class CostModel(Protocol):
    """Times of one pipeline stage (a tensor-parallel group counts as one).

    They follow from the batch alone. Batches of steps that are decided beforehand are asked for ahead of time, without the
    pages they will get, and some of them never run (not so with ``exact``).

    A model may also have ``decodes(batch, steps)``, the same numbers faster: :meth:`forward` of the decode batch ``batch``
    and of those that follow it while the same requests decode, ``steps`` in all, or None where there is no faster way.
    ``sampling_s(batch)``: the seconds of :meth:`forward` on the last stage that pass after a mask is needed (none, where a
    model cannot tell). And ``group_forward(batches)``: the seconds of a step that instances take together because they share
    their experts, each with its batch, or None where it has nothing to run; without it there is no such run.
    """

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time."""
        ...

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send the activations from ``stage`` to the next one."""
        ...
