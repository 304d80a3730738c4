"""Causal attention of several requests' new tokens over a paged context that holds them already.

One program takes BLOCK_M rows of one request and one KV head. A row is a (token, query head of that KV head) pair, so a
short extension still fills the matrix unit. Blocks that every row sees whole are computed without masks; only those on
the diagonal, and those where a sliding window begins, compare positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import arch, cdiv, next_power_of_2
from .decode_attention import LOG2_E


@triton.jit
def _attend(
    acc,
    total,
    largest,
    query,
    k_base,
    v_base,
    table,
    k_slot,
    v_slot,
    position,
    length,
    score_scale,
    begin,
    end,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the blocks ``begin .. end - 1`` into the running softmax of the rows."""
    column = tl.arange(0, BLOCK_D)
    for block in tl.range(begin, end, num_stages=STAGES):
        at = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if MASKED:
            page = tl.load(table + at // PAGE, mask=at < length, other=0).to(tl.int64)
        else:
            page = tl.load(table + at // PAGE).to(tl.int64)
        slot = page * PAGE + at % PAGE
        k_at = k_base + slot[:, None] * k_slot + column[None, :]
        v_at = v_base + slot[:, None] * v_slot + column[None, :]
        if MASKED:
            # What lies past the context may never have been written: 0 * NaN would spoil the sum.
            mask = (at < length)[:, None] & (column < WIDTH)[None, :]
            keys = tl.load(k_at, mask=mask, other=0.0)
            values = tl.load(v_at, mask=mask, other=0.0)
        elif WIDTH == BLOCK_D:
            keys = tl.load(k_at)
            values = tl.load(v_at)
        else:
            keys = tl.load(k_at, mask=(column < WIDTH)[None, :], other=0.0)
            values = tl.load(v_at, mask=(column < WIDTH)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * score_scale
        if MASKED:
            seen = at[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        base = larger
        if MASKED and WINDOW > 0:
            # A row may see nothing of the first blocks of its tile.
            base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        largest = larger
    return acc, total, largest


# Slices of packed arrays start anywhere: a variant for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["rows", "seq_lens"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    page_table,
    rows,
    q_starts,
    seq_lens,
    score_scale,
    q_token,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    table_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (KV heads, requests, tiles of the longest extension). out: [n, HEADS, WIDTH], contiguous."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    request = tl.program_id(1)
    start = tl.load(q_starts + request)
    extend = tl.load(q_starts + request + 1) - start
    # Last tiles see the most and start first, so that short work fills the end of the launch.
    tile = (extend * GROUP + BLOCK_M - 1) // BLOCK_M - 1 - tl.program_id(2)
    if tile >= 0:
        length = tl.load(seq_lens + request)
        prefix = length - extend
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        position = prefix + token
        column = tl.arange(0, BLOCK_D)
        row_mask = (token < extend)[:, None] & (column < WIDTH)[None, :]
        at_token = (start + token).to(tl.int64)
        query = tl.load(
            q + at_token[:, None] * q_token + head[:, None] * q_head + column[None, :], mask=row_mask, other=0.0
        )

        lowest = prefix + tile * BLOCK_M // GROUP
        highest = tl.minimum(prefix + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
        whole_end = (lowest + 1) // BLOCK_N
        end = highest // BLOCK_N + 1
        if WINDOW > 0:
            begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N
            whole_begin = (tl.maximum(highest - WINDOW + 1, 0) + BLOCK_N - 1) // BLOCK_N
            whole_begin = tl.minimum(tl.maximum(whole_begin, begin), whole_end)
        else:
            begin = 0
            whole_begin = 0

        table = page_table + tl.load(rows + request).to(tl.int64) * table_row
        k_base = k_cache + kv_head * k_head
        v_base = v_cache + kv_head * v_head
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if WINDOW > 0:
            acc, total, largest = _attend(
                acc,
                total,
                largest,
                query,
                k_base,
                v_base,
                table,
                k_slot,
                v_slot,
                position,
                length,
                score_scale,
                begin,
                whole_begin,
                WIDTH,
                PAGE,
                WINDOW,
                True,
                BLOCK_N,
                BLOCK_D,
                STAGES,
            )
        acc, total, largest = _attend(
            acc,
            total,
            largest,
            query,
            k_base,
            v_base,
            table,
            k_slot,
            v_slot,
            position,
            length,
            score_scale,
            whole_begin,
            whole_end,
            WIDTH,
            PAGE,
            WINDOW,
            False,
            BLOCK_N,
            BLOCK_D,
            STAGES,
        )
        acc, total, largest = _attend(
            acc,
            total,
            largest,
            query,
            k_base,
            v_base,
            table,
            k_slot,
            v_slot,
            position,
            length,
            score_scale,
            whole_end,
            end,
            WIDTH,
            PAGE,
            WINDOW,
            True,
            BLOCK_N,
            BLOCK_D,
            STAGES,
        )
        acc = acc / total[:, None]
        out_at = out + (at_token * HEADS + head)[:, None] * WIDTH + column[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=row_mask)


class PrefillConfig(NamedTuple):
    """Build of the prefill kernel for one shape."""

    block_m: int
    block_n: int
    stages: int
    warps: int


def prefill_config(arch: int, head_dim: int, itemsize: int, rows: int) -> PrefillConfig:
    """``rows``: most (token, query head) rows of one request and KV head; short ones get small tiles.

    Eight warps are two of Hopper's warpgroups, each with 64 rows of a tile: what ``wgmma`` takes at a time. A block's page
    numbers are loaded before the block itself, which takes two of the pipeline's stages each way: five keep two blocks of
    keys and values in flight, three keep one. The sizes are large ones that ptxas compiles without spilling.
    """
    width = next_power_of_2(head_dim)
    # Compute capabilities 9.0, 10.0 and 10.3 have 227 KB of shared memory a program, others 99 KB or little more.
    large = arch // 10 in (9, 10)
    if itemsize == 4:
        # Full precision runs on the ordinary units: small tiles keep the accumulators, and the products, in registers.
        return PrefillConfig(16, 32 if width <= 128 else 16, 3, 8)
    if rows <= 32:
        return PrefillConfig(16 if rows <= 16 else 32, 64 if width <= 128 else 32, 5, 4)
    if rows <= 64 or (width > 128 and not large):
        return PrefillConfig(64, 64 if large and width <= 128 else 32, 5 if width <= 128 else 3, 4 if rows <= 64 else 8)
    if width <= 64:
        return PrefillConfig(128, 128 if arch == 90 else 64, 5, 8)
    if width <= 128:
        return PrefillConfig(128, 64 if large else 32, 5, 8)
    return PrefillConfig(128, 64 if arch == 90 else 32, 3, 8)


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    rows: Tensor,
    q_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_extend: int,
    page_size: int,
    scale: float,
    window: int | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
) -> Tensor:
    """Launch. Arguments as in the operator; ``block_m`` and ``block_n`` override the configuration."""
    heads, width = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(rows) == 0 or max_extend == 0:
        return out
    config = prefill_config(arch(q.device), width, q.element_size(), max_extend * group)
    block_m = block_m or config.block_m
    prefill_kernel[(kv_heads, len(rows), cdiv(max_extend * group, block_m))](
        q,
        k_cache,
        v_cache,
        out,
        page_table,
        rows,
        q_starts,
        seq_lens,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        page_table.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        PAGE=page_size,
        WINDOW=window or 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n or config.block_n,
        BLOCK_D=max(16, next_power_of_2(width)),
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return out
