"""The device of a real run, and what its runner has to know: the settings resolved for torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends.capture_sizes import default_capture_sizes
from backends.checkpoint.precision import BY_FLAG
from workbench.loops import find_loop
from workbench.scheduler.config import ConfigError, largest_step
from workbench.scheduler.policy import load_policy
from workbench.settings.engines import Hardware
from workbench.settings.loading import HardwareOf, hardware_with
from workbench.settings.real import TORCH_DTYPES
from workbench.settings.run_settings import RunSettings

if TYPE_CHECKING:
    from backends.node_place import NodePlace
    from backends.torch.workers import RunnerOptions

DTYPE_NAMES = {theirs: ours for ours, theirs in TORCH_DTYPES.items() if theirs is not None} | {"fp8": "fp8"}
"""What torch calls a dtype, in our words."""


def choose_device(backend: str) -> str:
    """``cpu`` or ``cuda`` for a ``--backend``; ``auto`` takes a GPU where torch sees one.

    Raises ConfigError for another name and for a GPU that is not there, ModuleNotFoundError without torch.
    """
    import torch

    if backend not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"backend: {backend!r} is not one of auto, cpu, cuda")
    if backend == "cuda" and not torch.cuda.is_available():
        raise ConfigError("backend: cuda was asked for, and torch sees no GPU here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if backend == "auto" else backend


def runner_options(
    settings: RunSettings, loop: str, device: str, load_format: str = "auto", place: NodePlace | None = None
) -> RunnerOptions:
    """Return what the runner has to know to run ``settings`` under ``loop``; ``place`` is this machine's among several.

    Raises ConfigError for what a real runner does not do, and for a loop or policy of one's own that is none: both are known
    before a model is loaded.
    """
    from backends.torch.loader import FORMATS
    from backends.torch.workers import RunnerOptions

    if load_format not in FORMATS:
        raise ConfigError(f"load_format: {load_format!r} is not one of {', '.join(FORMATS)}")
    find_loop(loop, settings.role)
    load_policy(settings.policy)
    if settings.pool:
        raise ConfigError("pool: is for simulation; a real runner is one instance without it")
    for name in ("dp", "ep"):
        if getattr(settings, name) > 1:
            raise ConfigError(
                f"{name}: {getattr(settings, name)} is for simulation; a real runner is one instance without it"
            )
    if settings.dtype not in TORCH_DTYPES:
        raise ConfigError(f"dtype: {settings.dtype!r} is not one of {', '.join(TORCH_DTYPES)} on a real runner")
    if settings.kv_dtype != "bf16":
        raise ConfigError(f"kv_dtype: {settings.kv_dtype!r}: a real runner keeps KV in the dtype of the weights")
    tp, pp = settings.layout(loop)
    if place is not None and tp * pp % place.count:
        raise ConfigError(f"nodes: {place.count} nodes, and tp {tp} x pp {pp} does not spread evenly over them")
    slots = settings.slots(loop)
    graphs = settings.cuda_graphs and device == "cuda" and pp == 1
    return RunnerOptions(
        model=settings.model,
        device=device,
        dtype=TORCH_DTYPES[settings.dtype],
        fp8=settings.dtype == "fp8",
        load_format=load_format,
        tp=tp,
        pp=pp,
        rows=settings.rows_of(settings.role, slots),
        max_context=settings.max_context,
        page_size=settings.page_size,
        mem_fraction=settings.mem_fraction,
        kv_tokens=settings.kv_tokens,
        step_tokens=largest_step(settings),
        capture_sizes=tuple(default_capture_sizes(settings.running_per_slot(slots))) if graphs else (),
        seed=settings.seed,
        place=place,
    )


def held_weights(dtype: str, settings: RunSettings) -> dict[str, str]:
    """Say for a record what a real runner's weights are in: torch's ``dtype`` in our words, and who said it."""
    return {"dtype": DTYPE_NAMES[dtype], "said_by": "the checkpoint" if settings.dtype == "auto" else BY_FLAG}


def hardware_on(device: str) -> HardwareOf:
    """Find what ``device`` is to an engine whose defaults go by the GPU: a CPU is none."""

    def found(values: Mapping[str, Any]) -> Hardware | None:
        if device != "cuda":
            return None
        import torch

        gpu = torch.cuda.get_device_properties(0)
        return hardware_with(values, gpu.name.lower(), gpu.total_memory)

    return found


def device_name(device: str) -> str:
    """Return what a record calls the hardware."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    return f"cpu {platform.machine()}"
