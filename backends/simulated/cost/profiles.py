"""Profiles on disk, whatever their format."""

from __future__ import annotations

from pathlib import Path

from backends.simulated.cost import llmservingsim
from backends.simulated.cost.tables import OperatorTables, ProfileError, Provenance
from backends.simulated.cost.build import check_gpu, check_model, same_gpu
from backends.simulated.hardware import GPU, gpu_names
from backends.simulated.models import ModelSpec


def provenance(path: Path) -> Provenance:
    """What a profile is of. Raises :class:`ProfileError` for a folder that is none."""
    if llmservingsim.is_llmservingsim(path):
        return llmservingsim.provenance(path, 1)
    raise ProfileError(f"{path}: not a profile{_hint(path)}")


def identity(path: Path, kind: str = "profile") -> dict[str, str]:
    """The ``model`` and ``gpu`` of our catalogues that a profile is of, where it says so and they are there."""
    if kind == "fitted":
        from backends.simulated.cost.fitted import provenance as fitted_provenance

        source = fitted_provenance(path)
    else:
        source = provenance(path)
    found = {}
    gpus = [name for name in gpu_names() if same_gpu(source.gpu, name)]
    if gpus:
        found["gpu"] = gpus[0]
    if source.model is not None:
        found["model"] = source.model
    return found


def read_profile(path: Path, tp: int, model: ModelSpec, gpu: GPU, dtype: str = "bf16") -> OperatorTables:
    """The tables of a model on a GPU. Raises :class:`ProfileError` or ``CostError`` with one line."""
    source = provenance(path)
    check_model(path, source.model, model)
    check_gpu(path, source.gpu, gpu)
    if source.dtype != dtype:
        raise ProfileError(f"{path}: measured with {source.dtype} weights, not {dtype}")
    if any(window is not None for window in model.windows):
        raise ProfileError(f"{path}: {model.name} attends over sliding windows, which no table here holds; use roofline")
    return llmservingsim.read(path, tp, model)


def _hint(path: Path) -> str:
    if not path.is_dir():
        return ": no such folder"
    inside = sorted(str(p.parent.relative_to(path)) for p in path.rglob("meta.yaml"))
    return f" (these inside it are: {', '.join(inside[:4])})" if inside else ""
