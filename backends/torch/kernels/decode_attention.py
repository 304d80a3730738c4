"""Attention of one query a request over its paged context, in two launches that a CUDA graph can hold.

The contexts of a batch differ in length, so a grid over (request, head, split) leaves some multiprocessors idle. Here the
work is cut evenly instead: laid one after another, the blocks of BLOCK_N tokens of all requests and bundles of KV heads
form one line of units, and each of a fixed number of programs takes an equal stretch of it. A program finds where its
stretch begins from the sequence lengths on the device, in one pass over them, and goes on from there; the host reads none
of them. A (request, bundle) that falls to one program is written straight to the output. One that several programs share
leaves a partial result with each, and the second kernel, a program for every border between two stretches, weighs these by
their log-sum-exp.

A bundle is two KV heads where their queries fit one tile of 16 rows, else one. Queries are zero in the columns of the
other head, so one product gives the scores of both, and of the weighted values a row keeps its own head's columns.

A request may have several queries, the last tokens of its context: a verification of drafted tokens will.
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
def _first_block(length, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, QUERIES: tl.constexpr):
    """The block that holds the first token in sight of a context's queries."""
    return tl.maximum(length - (QUERIES - 1) - WINDOW, 0) // BLOCK_N if WINDOW > 0 else length * 0


@triton.jit
def _blocks(length, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, QUERIES: tl.constexpr):
    """Blocks in sight of a context's queries; 0 of an empty one."""
    return (length + BLOCK_N - 1) // BLOCK_N - _first_block(length, WINDOW, BLOCK_N, QUERIES)


@triton.jit
def _find(
    seq_lens,
    batch,
    number,
    BUNDLES: tl.constexpr,
    WINDOW: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """(units of a stretch, units in all, the request that stretch ``number`` begins in, the unit where that one begins)."""
    request = tl.arange(0, BATCH)
    length = tl.load(seq_lens + request, mask=request < batch, other=0)
    units = _blocks(length, WINDOW, BLOCK_N, QUERIES) * BUNDLES
    ends = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    # Very short stretches cost more in merging than they win.
    stretch = tl.maximum((total + PROGRAMS - 1) // PROGRAMS, LEAST)
    before = ends <= number * stretch
    return stretch, total, tl.sum(before.to(tl.int32), 0), tl.sum(tl.where(before, units, 0), 0)


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
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    BUNDLE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take one stretch of units. out: [b * QUERIES, HEADS, WIDTH], contiguous; partial: [pieces, rows of the tile, WIDTH].

    A row of the tile is a (query head, query) pair of a bundle, head by head; its columns are those of the bundle's heads,
    BLOCK_D each. LARGE: an offset into a cache may not fit 32 bits. ``score_scale`` includes log2(e).
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BUNDLES: tl.constexpr = KV_HEADS // BUNDLE
    ROWS: tl.constexpr = BUNDLE * GROUP * QUERIES
    program = tl.program_id(0)
    row = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BUNDLE * BLOCK_D)
    column, owner = lane % BLOCK_D, lane // BLOCK_D
    wide = (column < WIDTH)[None, :]
    mine = (row < ROWS)[:, None] & (owner[None, :] == (row // (GROUP * QUERIES))[:, None]) & wide
    # A request without a context, which pads a batch, belongs to no stretch.
    empty = program
    while empty < batch:
        if tl.load(seq_lens + empty) == 0:
            for head in tl.range(0, HEADS * QUERIES):
                at = (empty.to(tl.int64) * QUERIES * HEADS + head) * WIDTH
                tl.store(out + at + lane, tl.zeros_like(lane).to(out.dtype.element_ty), mask=lane < WIDTH)
        empty += PROGRAMS

    stretch, units, request, begin = _find(
        seq_lens, batch, program, BUNDLES, WINDOW, PROGRAMS, LEAST, BATCH, BLOCK_N, QUERIES
    )
    unit = program * stretch
    stop = tl.minimum(unit + stretch, units)
    # The pair that the stretch begins in; from there on it is the next bundle, or the next request.
    blocks = tl.maximum(_blocks(tl.load(seq_lens + request, mask=unit < stop, other=0), WINDOW, BLOCK_N, QUERIES), 1)
    bundle = (unit - begin) // blocks
    skipped = (unit - begin) % blocks
    while unit < stop:
        length = tl.load(seq_lens + request)
        blocks = _blocks(length, WINDOW, BLOCK_N, QUERIES)
        if blocks > 0:
            taken = tl.minimum(blocks - skipped, stop - unit)
            first = _first_block(length, WINDOW, BLOCK_N, QUERIES) + skipped
            table = page_table + tl.load(rows + request).to(tl.int64) * table_row
            k_base = k_cache + bundle * BUNDLE * k_head + owner * k_head + column
            v_base = v_cache + bundle * BUNDLE * v_head + owner * v_head + column

            token = request.to(tl.int64) * QUERIES + row % QUERIES
            head = bundle * BUNDLE * GROUP + row // QUERIES
            query = tl.load(
                q + token[:, None] * q_token + head[:, None] * q_head + column[None, :], mask=mine, other=0.0
            )
            position = length - QUERIES + row % QUERIES
            largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_H,), tl.float32)
            acc = tl.zeros((BLOCK_H, BUNDLE * BLOCK_D), tl.float32)
            for block in tl.range(first, first + taken, num_stages=STAGES):
                at = block * BLOCK_N + tl.arange(0, BLOCK_N)
                # Past the end the last token is read again: no load takes a mask, and the last block stays in the pipeline.
                near = tl.minimum(at, length - 1)
                if PAGE % BLOCK_N == 0:
                    page = tl.load(table + block * BLOCK_N // PAGE)
                elif (PAGE & (PAGE - 1)) == 0 and PAGE > 1:
                    few = block * (BLOCK_N // PAGE) + tl.arange(0, BLOCK_N // PAGE)
                    pages = tl.load(table + tl.minimum(few, (length - 1) // PAGE))
                    page = tl.reshape(tl.broadcast_to(pages[:, None], (BLOCK_N // PAGE, PAGE)), (BLOCK_N,))
                else:
                    page = tl.load(table + near // PAGE)
                if LARGE:
                    page = page.to(tl.int64)
                # Positions are not negative, which the compiler does not know: a mask saves it a division's corrections.
                slot = page * PAGE + (near & (PAGE - 1) if (PAGE & (PAGE - 1)) == 0 else near % PAGE)
                k_at = k_base[None, :] + slot[:, None] * k_slot
                v_at = v_base[None, :] + slot[:, None] * v_slot
                keys = tl.load(k_at) if WIDTH == BLOCK_D else tl.load(k_at, mask=wide, other=0.0)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * score_scale
                if QUERIES == 1:
                    seen = (at < length)[None, :]
                    if WINDOW > 0:
                        seen = seen & (at >= length - WINDOW)[None, :]
                else:
                    seen = at[None, :] <= position[:, None]
                    if WINDOW > 0:
                        seen = seen & (at[None, :] > position[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
                larger = tl.maximum(largest, tl.max(scores, 1))
                base = larger
                if QUERIES > 1:
                    # One query may see nothing of a block that another sees; a single one sees something of each.
                    base = tl.where(larger == float("-inf"), 0.0, larger)
                weights = tl.exp2(scores - base[:, None])
                shrink = tl.exp2(largest - base)
                total = total * shrink + tl.sum(weights, 1)
                values = tl.load(v_at) if WIDTH == BLOCK_D else tl.load(v_at, mask=wide, other=0.0)
                acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
                largest = larger

            # Of several queries one may see nothing of all that this program takes.
            acc = acc / (tl.where(total > 0, total, 1.0) if QUERIES > 1 else total)[:, None]
            if taken == blocks:
                at_out = (token * HEADS + head)[:, None] * WIDTH + column[None, :]
                tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=mine)
            else:
                # Along the line either the program or the pair goes up from piece to piece: their sum is a free place.
                piece = (program + request * BUNDLES + bundle).to(tl.int64) * ROWS + row
                tl.store(partial + piece[:, None] * WIDTH + column[None, :], acc, mask=mine)
                tl.store(partial_lse + piece, largest + tl.log2(total), mask=row < ROWS)
            unit += taken
            bundle += 1
            skipped = 0
        if (blocks == 0) | (bundle == BUNDLES):
            request += 1
            bundle = 0


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
    QUERIES: tl.constexpr,
    BUNDLE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LEAST: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One border between two stretches a program: merge the pieces of the (request, bundle) that it is the first to cut."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BUNDLES: tl.constexpr = KV_HEADS // BUNDLE
    ROWS: tl.constexpr = BUNDLE * GROUP * QUERIES
    border = tl.program_id(0) + 1
    stretch, units, request, begin = _find(
        seq_lens, batch, border, BUNDLES, WINDOW, PROGRAMS, LEAST, BATCH, BLOCK_N, QUERIES
    )
    unit = border * stretch
    if unit < units:
        blocks = _blocks(tl.load(seq_lens + request), WINDOW, BLOCK_N, QUERIES)
        bundle = (unit - begin) // blocks
        start = begin + bundle * blocks
        if (start < unit) & (start >= unit - stretch):
            last = (start + blocks - 1) // stretch
            row = tl.arange(0, BLOCK_R)
            column = tl.arange(0, BLOCK_D)
            mask = (row < ROWS)[:, None] & (column < WIDTH)[None, :]
            largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_R,), tl.float32)
            acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            for program in tl.range(border - 1, last + 1, PIECES, num_stages=STAGES):
                taker = program + tl.arange(0, PIECES)
                piece = (taker + request * BUNDLES + bundle).to(tl.int64)[:, None] * ROWS + row[None, :]
                there = (taker <= last)[:, None] & (row < ROWS)[None, :]
                lse = tl.load(partial_lse + piece, mask=there, other=float("-inf"))
                part = tl.load(
                    partial + piece[:, :, None] * WIDTH + column[None, None, :],
                    mask=(taker <= last)[:, None, None] & mask[None, :, :],
                    other=0.0,
                )
                larger = tl.maximum(largest, tl.max(lse, 0))
                base = tl.where(larger == float("-inf"), 0.0, larger)
                weights = tl.exp2(lse - base[None, :])
                shrink = tl.exp2(largest - base)
                total = total * shrink + tl.sum(weights, 0)
                acc = acc * shrink[:, None] + tl.sum(part * weights[:, :, None], 0)
                largest = larger
            token = request.to(tl.int64) * QUERIES + row % QUERIES
            head = bundle * BUNDLE * GROUP + row // QUERIES
            at_out = (token * HEADS + head)[:, None] * WIDTH + column[None, :]
            tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


class DecodeConfig(NamedTuple):
    """Build of the decode kernel for one shape."""

    bundle: int
    block_n: int
    stages: int
    warps: int
    programs_per_multiprocessor: int


def decode_config(arch: int, head_dim: int, itemsize: int, group: int, kv_heads: int, queries: int = 1) -> DecodeConfig:
    """Blocks of 16 KB of keys and as much of values; two programs share a multiprocessor.

    A block's page numbers are loaded before the block itself, so of a pipeline of 2k + 1 stages k are blocks: three of
    them (105 KB of shared memory) where that leaves room for two programs, else two (72 KB).
    """
    width = next_power_of_2(head_dim)
    together = itemsize == 2 and width <= 128 and kv_heads % 2 == 0 and 2 * group * queries <= 16
    bundle = 2 if together else 1
    block_n = max(16, min(128, 16384 // (bundle * width * itemsize)))
    two = arch // 10 in (8, 9, 10)
    return DecodeConfig(bundle, block_n, 7 if arch // 10 in (9, 10) else 5, 4, 2 if two else 1)


def shape_of(
    heads: int, kv_heads: int, width: int, window: int | None, queries: int, programs: int, batch: int, c: DecodeConfig
) -> dict[str, int]:
    """What both kernels are built for."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "WIDTH": width,
        "WINDOW": window or 0,
        "QUERIES": queries,
        "BUNDLE": c.bundle,
        "PROGRAMS": programs,
        "LEAST": 2,
        "BATCH": max(64, next_power_of_2(batch)),
        "BLOCK_N": c.block_n,
        "BLOCK_D": max(16, next_power_of_2(width)),
    }


def merge_tiles(rows: int) -> dict[str, int]:
    """Tiles of the merging kernel: ``rows`` results of as many (query head, query) pairs, several pieces at a time."""
    block_r = next_power_of_2(rows)
    return {"BLOCK_R": block_r, "PIECES": max(2, 32 // block_r), "STAGES": 3}


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
    queries: int = 1,
    programs: int | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Launch both kernels. Arguments as in the operator.

    ``queries`` of each request, the last tokens of its context, follow one another in q: [b * queries, h, d], and in the
    result. ``programs`` and ``config`` override the choice for the device.
    """
    _, heads, width = q.shape
    batch, kv_heads = len(rows), k_cache.shape[1]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    config = config or decode_config(arch(q.device), width, q.element_size(), group, kv_heads, queries)
    programs = programs or multiprocessors(q.device) * config.programs_per_multiprocessor
    tile = config.bundle * group * queries
    # Enough for any lengths: see where the kernel picks a piece's place.
    pieces = programs + batch * (kv_heads // config.bundle)
    partial = torch.empty((pieces, tile, width), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((pieces, tile), dtype=torch.float32, device=q.device)
    shape = shape_of(heads, kv_heads, width, window, queries, programs, batch, config)
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
        **shape,
        PAGE=page_size,
        LARGE=max(len(k_cache) * k_cache.stride(0), len(v_cache) * v_cache.stride(0)) >= 2**31,
        BLOCK_H=max(16, next_power_of_2(tile)),
        STAGES=config.stages,
        num_warps=config.warps,
    )
    if programs > 1:
        merge_kernel[(programs - 1,)](
            out, partial, partial_lse, seq_lens, batch, **shape, **merge_tiles(tile), num_warps=4
        )
    return out
