"""A cost model of one's own, whose answers are looked at before they become times of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from backends.simulated.cost import CostModel
from backends.simulated.cost.cost_request import CostRequest
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.own_code import check_methods, make_own
from workbench.scheduler.settings import ConfigError

METHODS = {"forward": ("batch", "stage"), "transfer_s": ("batch", "stage")}
OPTIONAL = {"decodes": ("batch", "steps"), "sampling_s": ("batch",), "group_forward": ("batches",)}
"""Methods that a model may also have (:class:`~backends.simulated.cost.CostModel`)."""


def own_cost(spec: str, want: CostRequest) -> CostModel:
    """Make the cost model ``module:Class`` of what it is asked to be of (:class:`CostRequest`).

    Raises ConfigError for what cannot be loaded or is no cost model.
    """
    model = make_own("cost", spec, METHODS, want=want)
    had = {name: arguments for name, arguments in OPTIONAL.items() if hasattr(model, name)}
    check_methods("cost", spec, model, had)
    return _Checked(spec, model)


class _Checked:
    """A cost model that answers as ``model`` does. Raises ConfigError for an answer that is no time: a clock that goes back
    or stands at NaN would show much later, and somewhere else."""

    def __init__(self, spec: str, model: Any) -> None:
        self._spec, self._model = spec, model
        if hasattr(model, "decodes"):
            self.decodes = self._decodes
        if hasattr(model, "sampling_s"):
            self.sampling_s = self._sampling_s
        if hasattr(model, "group_forward"):
            self.group_forward = self._group_forward
        self.notes = tuple(getattr(model, "notes", ()))

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return self._seconds("forward", self._model.forward(batch, stage))

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        return self._seconds("transfer_s", self._model.transfer_s(batch, stage))

    def _decodes(self, batch: ModelWorkerBatch, steps: int) -> list[float] | None:
        found = self._model.decodes(batch, steps)
        if found is None:
            return None
        if len(found) != steps:
            raise ConfigError(f"cost: {self._spec}.decodes returned {len(found)} times for {steps} steps")
        return [self._seconds("decodes", each) for each in found]

    def _sampling_s(self, batch: ModelWorkerBatch) -> float:
        return self._seconds("sampling_s", self._model.sampling_s(batch))

    def _group_forward(self, batches: Sequence[ModelWorkerBatch | None]) -> float:
        return self._seconds("group_forward", self._model.group_forward(batches))

    def _seconds(self, method: str, answer: Any) -> float:
        try:
            seconds = float(answer)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"cost: {self._spec}.{method} returned {answer!r}, which is no number of seconds")
        return seconds
