"""RMS norm over the last axis, and the same with the residual addition in front of it: one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2


# Of numbers that a batch decides, a 1 and a multiple of 16 would be variants of their own, compiled while requests wait.
@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, weight, out, rows, inner, x_outer, x_inner, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS rows a program. Row ``r`` of x lies at ``r // inner * x_outer + r % inner * x_inner``; out is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row // inner * x_outer + row % inner * x_inner
    value = tl.load(x + at[:, None] + column[None, :], mask=mask, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    # Rounded before the weight is applied, as the reference does.
    normed = (wide * scale[:, None]).to(value.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + column[None, :], (normed * gain[None, :]).to(value.dtype), mask=mask)


@triton.jit
def add_rms_norm_kernel(x, residual, weight, x_stride, residual_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: residual += x, x = rms_norm(residual), both in place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    before = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
    # The sum is rounded to the stream's dtype first: the norm must see what later layers will read.
    total = (value.to(tl.float32) + before.to(tl.float32)).to(value.dtype)
    tl.store(residual + row * residual_stride + column, total, mask=mask)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + row * x_stride + column, (normed * gain).to(value.dtype), mask=mask)


def warps_for(elements: int) -> int:
    """Warps of a program over so many elements: about 16 elements a thread, that is two 16-byte loads in flight."""
    return max(1, min(16, next_power_of_2(max(1, elements // 512))))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch over x of two or three axes (or contiguous of any number); returns a contiguous tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    if x.dim() == 3:
        inner, outer_stride, inner_stride = x.shape[1], x.stride(0), x.stride(1)
    elif x.dim() == 2:
        inner, outer_stride, inner_stride = 1, x.stride(0), 0
    else:
        inner, outer_stride, inner_stride = 1, width, 0
    rows = x.numel() // width if width else 0
    if rows == 0:
        return out
    block = next_power_of_2(width)
    # Heads are short rows: several of them share a program, as many however few there are.
    per_program = max(1, 2048 // block)
    rms_norm_kernel[(cdiv(rows, per_program),)](
        x,
        weight,
        out,
        rows,
        inner,
        outer_stride,
        inner_stride,
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=per_program,
        num_warps=warps_for(block * per_program),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch over x, residual: [n, d]; both are overwritten and returned."""
    rows, width = x.shape
    if rows:
        block = next_power_of_2(width)
        add_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            x.stride(0),
            residual.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return x, residual
