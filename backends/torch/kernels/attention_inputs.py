"""What attention needs of a projection in one launch: heads normalised and turned by position, keys and values stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2


@triton.jit
def _turn(
    x,
    x_head,
    out,
    out_head,
    weight,
    cos,
    sin,
    eps,
    head,
    heads,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    NORM: tl.constexpr,
):
    """Normalise (NORM) and rotate heads of x, and write them to out, which may be x. REST covers what is not rotated."""
    column = tl.arange(0, BLOCK)
    there = (head < heads)[:, None]
    mask = there & (column < HALF)[None, :]
    at, out_at = head[:, None] * x_head + column[None, :], head[:, None] * out_head + column[None, :]
    first_in, second_in = tl.load(x + at, mask=mask, other=0.0), tl.load(x + at + HALF, mask=mask, other=0.0)
    first, second = first_in.to(tl.float32), second_in.to(tl.float32)
    dtype = first_in.dtype
    if REST > 0:
        rest_column = 2 * HALF + tl.arange(0, REST)
        rest_mask = there & (rest_column < WIDTH)[None, :]
        rest_in = tl.load(x + head[:, None] * x_head + rest_column[None, :], mask=rest_mask, other=0.0)
        rest = rest_in.to(tl.float32)
    if NORM:
        squares = tl.sum(first * first + second * second, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / WIDTH + eps)[:, None]
        # Rounded before the weight is applied and before the rotation, as the reference does.
        gain = tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
        gain = tl.load(weight + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        second = ((second * scale).to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
        if REST > 0:
            gain = tl.load(weight + rest_column, mask=rest_column < WIDTH, other=0.0).to(tl.float32)[None, :]
            rest = (rest * scale).to(dtype).to(tl.float32) * gain
    tl.store(out + out_at, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out + out_at + HALF, (second * cos + first * sin).to(dtype), mask=mask)
    if REST > 0:
        tl.store(out + head[:, None] * out_head + rest_column[None, :], rest.to(dtype), mask=rest_mask)


# Slices of packed arrays start anywhere: a variant for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["positions"])
def attention_inputs_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    k_cache,
    v_cache,
    positions,
    slots,
    cos_sin,
    eps,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cache_slot,
    cache_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token along axis 0; along axis 1 first its query heads, BLOCK_H at a time, then the KV heads.

    Queries are turned in place, keys on their way to the cache."""
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    at = tl.load(positions + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(cos_sin + at + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + at + HALF + column, mask=column < HALF, other=0.0)[None, :]
    if part < Q_BLOCKS:
        head = part * BLOCK_H + tl.arange(0, BLOCK_H)
        x = q + token * q_token
        _turn(x, q_head, x, q_head, q_weight, cos, sin, eps, head, Q_HEADS, WIDTH, HALF, BLOCK, REST, NORM)
    else:
        head = (part - Q_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        slot = tl.load(slots + token).to(tl.int64) * cache_slot
        wide = tl.arange(0, BLOCK_D)
        mask = (head < K_HEADS)[:, None] & (wide < WIDTH)[None, :]
        values = tl.load(v + token * v_token + head[:, None] * v_head + wide[None, :], mask=mask)
        tl.store(v_cache + slot + head[:, None] * cache_head + wide[None, :], values, mask=mask)
        x, out = k + token * k_token, k_cache + slot
        _turn(x, k_head, out, cache_head, k_weight, cos, sin, eps, head, K_HEADS, WIDTH, HALF, BLOCK, REST, NORM)


def blocks(q_heads: int, kv_heads: int, width: int, rotary: int) -> dict[str, int]:
    """Tile sizes of a shape. A program takes about 2,048 elements."""
    half = rotary // 2
    most = max(1, 2048 // next_power_of_2(width))
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": kv_heads,
        "WIDTH": width,
        "HALF": half,
        "BLOCK_H": min(most, next_power_of_2(q_heads)),
        "BLOCK": next_power_of_2(half),
        "REST": next_power_of_2(width - rotary) if width > rotary else 0,
        "BLOCK_D": next_power_of_2(width),
    }


def attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Launch. Arguments as in the operator; the two caches have the same strides."""
    tokens, q_heads, width = q.shape
    if tokens == 0:
        return q
    tiles = blocks(q_heads, k.shape[1], width, cos_sin.shape[1])
    per_program = tiles["BLOCK_H"]
    attention_inputs_kernel[(tokens, cdiv(q_heads, per_program) + cdiv(k.shape[1], per_program))](
        q,
        k,
        v,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        k_cache,
        v_cache,
        positions,
        slots,
        cos_sin,
        eps,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        **tiles,
        NORM=q_norm is not None,
        num_warps=max(1, min(8, per_program * tiles["BLOCK_D"] // 512)),
    )
    return q
