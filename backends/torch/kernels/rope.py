"""Rotary position embedding of query and key heads, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2


@triton.jit
def _rotate(
    x, cos, sin, token, token_stride, head_stride, heads, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    head = tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (column < HALF)[None, :]
    first_at = x + token * token_stride + head[:, None] * head_stride + column[None, :]
    first_in = tl.load(first_at, mask=mask, other=0.0)
    first = first_in.to(tl.float32)
    second = tl.load(first_at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cos - second * sin).to(first_in.dtype), mask=mask)
    tl.store(first_at + HALF, (second * cos + first * sin).to(first_in.dtype), mask=mask)


# Slices of packed arrays start anywhere: a variant for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["positions"])
def rope_kernel(
    q,
    k,
    positions,
    cos_sin,
    q_token,
    q_head,
    k_token,
    k_head,
    q_heads,
    k_heads,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    """One token a program: all its query heads, then all its key heads, by the same angles."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = tl.load(positions + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(cos_sin + at + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + at + HALF + column, mask=column < HALF, other=0.0)[None, :]
    _rotate(q, cos, sin, token, q_token, q_head, q_heads, HALF, BLOCK, Q_HEADS)
    _rotate(k, cos, sin, token, k_token, k_head, k_heads, HALF, BLOCK, K_HEADS)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Launch over q: [n, h, d] and k: [n, hk, d], overwriting the first ``cos_sin.shape[1]`` elements of every head."""
    if len(q) == 0:
        return
    half = cos_sin.shape[1] // 2
    q_heads, k_heads = next_power_of_2(q.shape[1]), next_power_of_2(k.shape[1])
    block = next_power_of_2(half)
    rope_kernel[(len(q),)](
        q,
        k,
        positions,
        cos_sin,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        q.shape[1],
        k.shape[1],
        HALF=half,
        BLOCK=block,
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        num_warps=max(1, min(8, q_heads * block // 256)),
    )
