"""The gated activation of dense feed-forward layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2


@triton.jit
def silu(x):
    """``x * sigmoid(x)`` of float32; exp2 is the hardware's own exponential."""
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def silu_and_mul_kernel(x, out, row_stride, width, BLOCK: tl.constexpr):
    """One row a program along axis 0, BLOCK columns along axis 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x + row * row_stride + column, mask=mask, other=0.0)
    up = tl.load(x + row * row_stride + width + column, mask=mask, other=0.0)
    active = silu(gate.to(tl.float32)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + column, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_and_mul(x: Tensor) -> Tensor:
    """Launch over x: [n, 2m]; returns [n, m]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(2048, next_power_of_2(width))
        silu_and_mul_kernel[(rows, cdiv(width, block))](
            x, out, x.stride(0), width, BLOCK=block, num_warps=max(1, min(8, block // 256))
        )
    return out
