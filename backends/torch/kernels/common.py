"""The common part of the launchers: facts about the device and checks that say what is wrong with an argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes the kernels take for activations, weights and caches."""

INTERPRETER = 0
"""The ``arch`` of a CPU tensor: the Triton interpreter runs it."""


@cache
def _properties(device: torch.device) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


def arch(device: torch.device) -> int:
    """90 for compute capability 9.0; :data:`INTERPRETER` off a GPU."""
    return _properties(device)[0] if device.type == "cuda" else INTERPRETER


def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side at one a multiprocessor; a small number in the interpreter."""
    return _properties(device)[1] if device.type == "cuda" else 4


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` holds float16, bfloat16 or float32."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: {x.dtype} is not one of float16, bfloat16, float32")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the dtype of ``x`` is one of ``allowed``."""
    if x.dtype not in allowed:
        raise TypeError(f"{name}: {x.dtype} where {' or '.join(str(d) for d in allowed)} is wanted")


def check_shape(name: str, x: Tensor, *shape: int | None) -> None:
    """Raise ValueError unless ``x`` has this shape; None stands for any size."""
    if x.dim() != len(shape) or any(shape[i] not in (None, size) for i, size in enumerate(x.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {tuple(x.shape)} where [{wanted}] is wanted")


def check_last_stride(name: str, x: Tensor) -> None:
    """Raise ValueError unless neighbours of the last axis are neighbours in memory."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: the last axis has stride {x.stride(-1)}; the kernels need 1")


def check_contiguous(name: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous")


Result = TypeVar("Result")
MOST_SHAPES = 4096
"""That an operator remembers to have checked."""


def launches(launch: Callable[..., Result]) -> Callable[[Callable[..., None]], Callable[..., Result]]:
    """Make an operator of a function that checks its arguments: ``launch`` is called with the same ones.

    All arguments alike (tensors of equal dtypes, shapes and strides) are checked once: a step calls a few operators hundreds
    of times over, and to know that nothing has changed takes less time than to look at everything again.
    """

    def around(check: Callable[..., None]) -> Callable[..., Result]:
        right: set[tuple[Any, ...]] = set()

        @wraps(check)
        def operator(*args: Any, **named: Any) -> Result:
            facts = [(a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args]
            for name, a in named.items():
                facts += name, (a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a
            alike = tuple(facts)
            if alike not in right:
                check(*args, **named)
                if len(right) >= MOST_SHAPES:
                    right.clear()
                right.add(alike)
            return launch(*args, **named)

        return operator

    return around
