"""What a GPU waits between two steps whatever a loop overlaps: preparation that waits for the GPU itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.simulated.cost import CostModel
from workbench.scheduler.batch import ModelWorkerBatch


def with_gaps(cost: CostModel, gap_s: float, gap_request_s: float, gap_prompt_token_s: float = 0.0) -> CostModel:
    """A cost model whose steps are longer by so much, and by so much for each request and each prompt token in them."""
    gaps = (gap_s, gap_request_s, gap_prompt_token_s)
    return _WithGaps(cost, *gaps) if any(gaps) else cost


class _WithGaps:
    def __init__(self, inner: Any, gap_s: float, gap_request_s: float, gap_prompt_token_s: float) -> None:
        self._inner, self._gap_s, self._gap_request_s = inner, gap_s, gap_request_s
        self._gap_prompt_token_s = gap_prompt_token_s
        self._forward = inner.forward
        if hasattr(inner, "decodes"):
            self.decodes = self._decodes
        if hasattr(inner, "group_forward"):
            self.group_forward = self._group_forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # what a model may also have, and its notes

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        seconds: float = self._forward(batch, stage)
        return seconds if stage else seconds + self._gap(len(batch.rows), batch.prefill_tokens)

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return float(self._inner.transfer_s(batch, stage))

    def _decodes(self, batch: ModelWorkerBatch, steps: int) -> list[float] | None:
        found = self._inner.decodes(batch, steps)
        gap_s = self._gap(len(batch.rows), 0)
        return None if found is None else [seconds + gap_s for seconds in found]

    def _group_forward(self, batches: Sequence[ModelWorkerBatch | None]) -> float:
        most = max(self._gap(len(batch.rows), batch.prefill_tokens) for batch in batches if batch is not None)
        return float(self._inner.group_forward(batches)) + most

    def _gap(self, requests: int, prompt_tokens: int) -> float:
        return self._gap_s + self._gap_request_s * requests + self._gap_prompt_token_s * prompt_tokens
