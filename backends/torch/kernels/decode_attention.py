"""Attention of one query a request over its paged context, in two launches that a CUDA graph can hold.

The contexts of a batch differ in length, so a grid over (request, head, split) leaves some multiprocessors idle. Here the
work is cut evenly instead: laid one after another, the blocks of BLOCK_N tokens of all requests and KV heads form one
line of units, and each of a fixed number of programs takes an equal stretch of it. A program finds its stretch from the
sequence lengths on the device; the host reads none of them. A (request, KV head) that falls to one program is written
straight to the output. One that several programs share leaves a partial result with each, and the second kernel weighs
these by their log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import arch, multiprocessors, next_power_of_2

LOG2_E = 1.4426950408889634


@triton.jit
def _first_block(length, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block that holds the first token in sight of a context's last one."""
    return tl.maximum(length - WINDOW, 0) // BLOCK_N if WINDOW > 0 else length * 0


@triton.jit
def _block_ends(seq_lens, batch, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BATCH: tl.constexpr):
    """int32[BATCH]: blocks of the requests up to and with each."""
    request = tl.arange(0, BATCH)
    length = tl.load(seq_lens + request, mask=request < batch, other=0)
    return tl.cumsum((length + BLOCK_N - 1) // BLOCK_N - _first_block(length, WINDOW, BLOCK_N), 0)


@triton.jit
def _stretch(units, PROGRAMS: tl.constexpr, LEAST: tl.constexpr):
    """Units a program takes. Very short stretches cost more in merging than they win."""
    return tl.maximum((units + PROGRAMS - 1) // PROGRAMS, LEAST)


# Slices of packed arrays start anywhere: a variant for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["rows", "seq_lens"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial,
    partial_lse,
    page_table,
    rows,
    seq_lens,
    batch,
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
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take one stretch of units. out: [b, HEADS, WIDTH], contiguous; partial: [PROGRAMS + b * KV_HEADS, group, WIDTH].

    The query heads of a KV head are the rows of one matrix, padded to BLOCK_H. ``score_scale`` includes log2(e).
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    ends = _block_ends(seq_lens, batch, WINDOW, BLOCK_N, BATCH) * KV_HEADS
    units = tl.max(ends, 0)
    stretch = _stretch(units, PROGRAMS, LEAST)
    unit = program * stretch
    stop = tl.minimum(unit + stretch, units)
    head_row = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    head_mask = (head_row < GROUP)[:, None] & (column < WIDTH)[None, :]
    while unit < stop:
        request = tl.sum((ends <= unit).to(tl.int32), 0)
        begin = tl.max(tl.where(ends <= unit, ends, 0), 0)
        blocks = (tl.min(tl.where(ends > unit, ends, units), 0) - begin) // KV_HEADS
        kv_head = (unit - begin) // blocks
        skipped = (unit - begin) % blocks
        taken = tl.minimum(blocks - skipped, stop - unit)
        length = tl.load(seq_lens + request)
        first = _first_block(length, WINDOW, BLOCK_N) + skipped
        table = page_table + tl.load(rows + request).to(tl.int64) * table_row

        query_at = request.to(tl.int64) * q_token + (kv_head * GROUP + head_row)[:, None] * q_head + column[None, :]
        query = tl.load(q + query_at, mask=head_mask, other=0.0)
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for block in tl.range(first, first + taken, num_stages=STAGES):
            at = block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = at < length
            page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
            slot = page * PAGE + at % PAGE
            mask = inside[:, None] & (column < WIDTH)[None, :]
            keys = tl.load(k_cache + kv_head * k_head + slot[:, None] * k_slot + column[None, :], mask=mask, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * score_scale
            if WINDOW > 0:
                inside = inside & (at >= length - WINDOW)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            # Every block taken holds a token in sight, so the maximum is finite from the first block on.
            larger = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, 1)
            values = tl.load(
                v_cache + kv_head * v_head + slot[:, None] * v_slot + column[None, :], mask=mask, other=0.0
            )
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
            largest = larger

        acc = acc / total[:, None]
        if taken == blocks:
            at_out = request.to(tl.int64) * HEADS + kv_head * GROUP + head_row
            tl.store(out + at_out[:, None] * WIDTH + column[None, :], acc.to(out.dtype.element_ty), mask=head_mask)
        else:
            # Along the line either the program or the pair goes up from piece to piece: their sum is a free place.
            piece = (program + request * KV_HEADS + kv_head).to(tl.int64) * GROUP + head_row
            tl.store(partial + piece[:, None] * WIDTH + column[None, :], acc, mask=head_mask)
            tl.store(partial_lse + piece, largest + tl.log2(total), mask=head_row < GROUP)
        unit += taken


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["seq_lens"])
def merge_kernel(
    out,
    partial,
    partial_lse,
    seq_lens,
    batch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One (request, query head) a program: merge its pieces, PIECES at a time, if there are several."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    request = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    ends = _block_ends(seq_lens, batch, WINDOW, BLOCK_N, BATCH) * KV_HEADS
    stretch = _stretch(tl.max(ends, 0), PROGRAMS, LEAST)
    begin = tl.max(tl.where(tl.arange(0, BATCH) < request, ends, 0), 0)
    blocks = (tl.max(tl.where(tl.arange(0, BATCH) <= request, ends, 0), 0) - begin) // KV_HEADS
    column = tl.arange(0, BLOCK_D)
    out_at = out + (request.to(tl.int64) * HEADS + head) * WIDTH + column
    if blocks == 0:
        # A row that pads the batch and has no context: no program took it.
        tl.store(out_at, tl.zeros((BLOCK_D,), out.dtype.element_ty), mask=column < WIDTH)
    first = (begin + kv_head * blocks) // stretch
    last = (begin + (kv_head + 1) * blocks - 1) // stretch
    if (blocks > 0) & (last > first):
        largest = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.range(first, last + 1, PIECES):
            program = start + tl.arange(0, PIECES)
            piece = (program + request * KV_HEADS + kv_head).to(tl.int64) * GROUP + head % GROUP
            mask = program <= last
            lse = tl.load(partial_lse + piece, mask=mask, other=float("-inf"))
            part = tl.load(
                partial + piece[:, None] * WIDTH + column[None, :],
                mask=mask[:, None] & (column < WIDTH)[None, :],
                other=0.0,
            )
            larger = tl.maximum(largest, tl.max(lse, 0))
            weights = tl.exp2(lse - larger)
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, 0)
            acc = acc * shrink + tl.sum(part * weights[:, None], 0)
            largest = larger
        tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=column < WIDTH)


class DecodeConfig(NamedTuple):
    """Build of the decode kernel for one shape."""

    block_n: int
    stages: int
    warps: int
    programs_per_multiprocessor: int


def decode_config(arch: int, head_dim: int, itemsize: int) -> DecodeConfig:
    """Blocks of 16 KB of keys and as much of values; two programs share a multiprocessor.

    A block's page numbers are loaded before the block itself, so of a pipeline of 2k + 1 stages k are blocks: three of
    them (105 KB of shared memory) where that leaves room for two programs, else two (72 KB).
    """
    row = next_power_of_2(head_dim) * itemsize
    block_n = max(16, min(128, 16384 // row))
    return DecodeConfig(block_n, 7 if arch // 10 in (9, 10) else 5, 4, 2 if arch // 10 in (8, 9, 10) else 1)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    programs: int | None = None,
    block_n: int | None = None,
) -> Tensor:
    """Launch both kernels. Arguments as in the operator; ``programs`` and ``block_n`` override the configuration."""
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    out = torch.empty((batch, heads, width), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    config = decode_config(arch(q.device), width, q.element_size())
    block_n = block_n or config.block_n
    programs = programs or multiprocessors(q.device) * config.programs_per_multiprocessor
    # Enough for any lengths: see where the kernel picks a piece's place.
    pieces = programs + batch * kv_heads
    partial = torch.empty((pieces, group, width), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((pieces, group), dtype=torch.float32, device=q.device)
    common = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "WIDTH": width,
        "WINDOW": window or 0,
        "PROGRAMS": programs,
        "LEAST": 2,
        "BATCH": max(64, next_power_of_2(batch)),
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, next_power_of_2(width)),
    }
    decode_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        out,
        partial,
        partial_lse,
        page_table,
        rows,
        seq_lens,
        batch,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        page_table.stride(0),
        **common,
        PAGE=page_size,
        BLOCK_H=max(16, next_power_of_2(group)),
        STAGES=config.stages,
        num_warps=config.warps,
    )
    merge_kernel[(batch, heads)](out, partial, partial_lse, seq_lens, batch, **common, PIECES=16, num_warps=4)
    return out
