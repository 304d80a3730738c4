"""Requests for a cost model, and checks that a profile fits one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backends.checkpoint.precision import Precision, named
from backends.simulated.catalogue.gpu_specs import GPU, same_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, same_model
from backends.simulated.cost.models.exchange import Exchange
from ground.errors import InputError


class CostError(InputError):
    """A cost model that cannot be had, in one line."""


@dataclass(frozen=True)
class CostRequest:
    """The model, GPU, precision and layout that a cost model is wanted for."""

    model: ModelSpec
    gpu: GPU
    weights: Precision = field(default_factory=lambda: named("bf16"))
    kv_dtype: str = "bf16"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    capture_sizes: Sequence[int] = ()
    mixed_capture_sizes: Sequence[int] = ()
    step_s: float = 0.0
    """GPU time of a step beside the model; the roofline and fitted costs have it already."""
    request_s: float = 0.0
    """GPU time of a step beside the model for each request in it."""
    engine: str = ""
    """Preset of the engine whose kernels run, with its version."""
    expert_skew: float | None = None
    """How unevenly tokens fall on experts: the exponent of a power law; None: as the tables have it, else evenly."""
    exchange: Exchange | None = None
    """How tokens reach experts on other GPUs; None: as the cost model has it."""
    links_said: bool = False
    """Whether somebody said what links achieve: that then stands, and not what was measured on another machine."""

    @property
    def dtype(self) -> str:
        """Name of the weights' precision, by which profiles are told apart."""
        return self.weights.dtype


def check_model(path: Path, profiled: str | None, model: ModelSpec) -> None:
    """Raise :class:`CostError` when a profile is of another model."""
    if profiled is not None and not same_model(profiled, model.name):
        raise CostError(f"{path}: measured with {profiled}, not {model.name}")


def check_gpu(path: Path, profiled: str, gpu: GPU) -> None:
    """Raise :class:`CostError` when a profile is of another GPU. Names are compared by their letters and digits."""
    if not same_gpu(profiled, gpu.name):
        raise CostError(f"{path}: measured on {profiled}, not {gpu.name}")
