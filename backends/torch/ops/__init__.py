"""The operators that models are written in, in two interchangeable sets.

``reference`` is plain torch and runs anywhere; ``triton`` launches the kernels of ``backends/torch/kernels`` and needs a GPU
(or the Triton interpreter). Both are modules with the same functions: models get one of them and call it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

OPS = ("reference", "triton")


def load_ops(name: str | None = None, device: torch.device | str = "cpu") -> ModuleType:
    """The operator set ``name``, or the one that suits ``device``.

    Raises ValueError for an unknown name.
    """
    if name is None:
        name = "triton" if torch.device(device).type == "cuda" else "reference"
    if name not in OPS:
        raise ValueError(f"ops: {name!r} is not one of {', '.join(OPS)}")
    return importlib.import_module(f"backends.torch.ops.{name}")
