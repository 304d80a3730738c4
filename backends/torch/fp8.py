"""Weights in FP8 (e4m3): how they are scaled, quantised and read from checkpoints.

A weight [rows, columns] is held as float8 values and float32 scales; value times scale is the weight. A scale is of a
block of rows and columns (128 x 128 in published checkpoints), or of the whole tensor. Activations stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3 number."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """Form of a model's projections in FP8."""

    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: the whole tensor does."""
    saved: bool = False
    """The checkpoint holds FP8 values and scales; else weights are quantised as they are read."""

    def of(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) of a block of a tensor of this shape."""
        return self.block if self.block is not None else (rows, columns)


def scale_shape(shape: tuple[int, ...], fp8: Fp8) -> tuple[int, int]:
    """The shape of a weight's scales."""
    rows, columns = fp8.of(shape[0], shape[1])
    return -(-shape[0] // rows), -(-shape[1] // columns)


def quantise(weight: Tensor, fp8: Fp8) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> (e4m3 of the same shape, float32 scales): every block's largest value becomes 448."""
    rows, columns = fp8.of(*weight.shape)
    down, across = scale_shape(tuple(weight.shape), fp8)
    padded = torch.zeros((down * rows, across * columns), dtype=torch.float32, device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(down, rows, across, columns)
    scales = blocks.abs().amax((1, 3)) / LARGEST
    scales[scales == 0] = 1.0
    blocks /= scales[:, None, :, None]
    # Division may round a hair beyond the largest number, which would be no number in e4m3.
    values = padded.clamp_(-LARGEST, LARGEST)[: weight.shape[0], : weight.shape[1]]
    return values.to(DTYPE), scales


def row_scales(scales: Tensor, rows: int, fp8: Fp8) -> Tensor:
    """A tensor's scales -> float32[rows, blocks across]: each row with its own, as the products want them."""
    if fp8.block is None:
        return scales.float().reshape(1, 1).expand(rows, 1)
    return scales.float().repeat_interleave(fp8.block[0], 0)[:rows]


def dequantise(values: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weight in float32. values: e4m3[n, k]; scales: float32[n, blocks across], each of ``columns`` columns."""
    return values.float() * scales.repeat_interleave(columns, 1)[:, : values.shape[1]]
