"""The same tests run in the Triton interpreter without a GPU and on the GPU with one.

Kernels are made for one or the other when their module is imported, so the choice holds for a whole pytest process; it is
made here, before any kernel is imported. That does no harm to other tests: on a machine without a GPU kernels could not
run at all otherwise. Tests that compile kernels do so in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


def pytest_generate_tests(metafunc):
    """``dtype``: what tests can check here. The interpreter multiplies bfloat16 matrices wrongly, without a word.

    ``matrix_dtype``: the same on a GPU, where dtypes take different instructions; in the slow interpreter they do not, and
    float32 shows errors best.
    """
    dtypes = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
    for name, values in (("dtype", dtypes), ("matrix_dtype", dtypes[:1] if INTERPRETED else dtypes)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda d: str(d).removeprefix("torch."))
