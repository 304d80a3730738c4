"""The product with a weight in FP8: a quarter of float32's bytes, half of bfloat16's, and as many multiplications.

Decode steps wait for weights, so reading half the bytes is the gain; activations keep their dtype and nothing but the
weight is rounded. e4m3 is turned into float16 by moving its bits: the exponents differ by 8, which the scale puts right,
and subnormals come out exact. That works on every GPU, also on those without FP8 instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETER, arch, cdiv, next_power_of_2


# Of numbers that a batch decides, a 1 and a multiple of 16 would be variants of their own, compiled while requests wait.
@triton.jit(do_not_specialize=["rows"])
def fp8_linear_kernel(
    x,
    weight,
    scales,
    out,
    rows,
    columns,
    depth,
    x_row,
    weight_row,
    scale_row,
    SCALE_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[m, n] = x[m, k] @ weight[n, k].T, the weight as bytes. SCALE_COLUMNS: columns of the weight that share a scale of
    a row, a multiple of BLOCK_K, or 0 when all do. EVEN: BLOCK_K divides depth. SWAP: the weight is the product's left
    operand."""
    program = tl.program_id(0)
    down = (rows + BLOCK_M - 1) // BLOCK_M
    across = (columns + BLOCK_N - 1) // BLOCK_N
    # GROUP blocks of rows go through a stripe of weights together, while it is in the cache.
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    row = (group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    x_at = x + row[:, None].to(tl.int64) * x_row + step[None, :]
    weight_at = weight + column[:, None].to(tl.int64) * weight_row + step[None, :]
    there, wanted = (row < rows)[:, None], (column < columns)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        if EVEN:
            rows_in = tl.load(x_at + start, mask=there, other=0.0)
            bits = tl.load(weight_at + start, mask=wanted, other=0)
        else:
            left = (step < depth - start)[None, :]
            rows_in = tl.load(x_at + start, mask=there & left, other=0.0)
            bits = tl.load(weight_at + start, mask=wanted & left, other=0)
        wide = bits.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = half.to(rows_in.dtype)
        if SWAP:
            left_in, right_in = value, tl.trans(rows_in)
        else:
            left_in, right_in = rows_in, tl.trans(value)
        if SCALE_COLUMNS == 0:
            acc = tl.dot(left_in, right_in, acc, input_precision="ieee")
        else:
            part = tl.dot(left_in, right_in, input_precision="ieee")
            scale = tl.load(scales + column * scale_row + start // SCALE_COLUMNS, mask=column < columns, other=0.0)
            acc += part * (scale[:, None] if SWAP else scale[None, :])
    if SCALE_COLUMNS == 0:
        scale = tl.load(scales + column * scale_row, mask=column < columns, other=0.0)
        acc *= scale[:, None] if SWAP else scale[None, :]
    # float16 has an exponent bias of 15, e4m3 one of 7.
    acc *= 256.0
    if SWAP:
        acc = tl.trans(acc)
    tl.store(
        out + row[:, None].to(tl.int64) * columns + column[None, :],
        acc.to(out.dtype.element_ty),
        mask=there & (column < columns)[None, :],
    )


class Fp8Config(NamedTuple):
    """Tile sizes of one launch."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    """The weight is the product's left operand."""


def fp8_config(device_arch: int, rows: int, itemsize: int, scale_columns: int) -> Fp8Config:
    """Tiles for ``rows`` rows of activations; ``scale_columns`` 0: one scale a row."""
    if device_arch == INTERPRETER:
        return Fp8Config(16, 32, min(32, scale_columns or 32), 4, 1)
    # Few rows read each weight once: narrow tiles, deep pipelines. Many reuse it: large tiles.
    block_m = min(max(next_power_of_2(max(rows, 1)), 16), 128)
    block_n, block_k, warps, stages = (64, 128, 4, 4) if block_m <= 32 else (128, 64, 8, 3)
    swap = False
    if itemsize == 4:
        # On the ordinary units, whose products stay in registers: larger tiles would spill.
        block_m, block_n, block_k, stages = min(block_m, 64), 64, 32, 2
    elif block_m >= 64 and device_arch // 10 in (9, 10):
        # A left operand may come from registers: converted weights go to the matrix unit from there, while a right one has
        # to pass through shared memory. With one scale a row, a taller tile makes more of each weight that was converted.
        stages, swap = 4, True
        if scale_columns == 0 and rows > 128:
            block_m = 256
    return Fp8Config(block_m, block_n, min(block_k, scale_columns or block_k), warps, stages, swap)


def fp8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, scale_columns: int, *, config: Fp8Config | None = None
) -> Tensor:
    """Launch. Arguments as in the operator; ``config`` overrides the choice for the device."""
    rows, depth = x.shape
    columns = len(weight)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    shared = 0 if scales.shape[1] == 1 else scale_columns
    config = config or fp8_config(arch(x.device), rows, x.dtype.itemsize, shared)
    grid = (cdiv(rows, config.block_m) * cdiv(columns, config.block_n),)
    fp8_linear_kernel[grid](
        x,
        weight.view(torch.uint8),
        scales,
        out,
        rows,
        columns,
        depth,
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        SCALE_COLUMNS=shared,
        EVEN=depth % config.block_k == 0,
        SWAP=config.swap,
        GROUP=8,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return out
