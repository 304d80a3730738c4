"""How long a batch takes on a modelled GPU."""

from __future__ import annotations

from typing import Protocol

from workbench.scheduler.batch import ModelWorkerBatch


class CostModel(Protocol):
    """Times of one pipeline stage (a tensor-parallel group counts as one).

    A model may also have ``decodes(first)``, the same numbers faster: an iterator over :meth:`forward` of the decode batch
    ``first`` and of those that follow while the same requests decode, or None where there is no faster way.
    """

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time."""
        ...

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send the activations from ``stage`` to the next one."""
        ...
