"""A layer of gated experts: routing, sorting by expert, two grouped matrix products and the weighted sum.

A (token, chosen expert) is a pair; pair ``token * top_k + nth``. Pairs are sorted by expert into blocks of BLOCK_M, the last
block of an expert filled up with the number of pairs, which is no pair. How many blocks come out is known on the device
alone; the launch covers the most there can be. Nothing is added up with atomics, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import silu
from .common import INTERPRETER, arch, cdiv, next_power_of_2


# Of numbers that a batch decides, a 1 and a multiple of 16 would be variants of their own, compiled while requests wait.
@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,
    weights,
    experts,
    tokens,
    row_stride,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS tokens a program: softmax over the experts, then the largest TOP_K one by one, lower numbers first in a tie."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    mask = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    # Padding must neither win nor count: exp2(-inf) is 0. Rows past the end are made finite so that no NaN arises.
    other = tl.where((expert < EXPERTS)[None, :], 0.0, float("-inf"))
    score = tl.load(logits + token[:, None] * row_stride + expert[None, :], mask=mask, other=other).to(tl.float32)
    share = tl.exp2((score - tl.max(score, 1)[:, None]) * 1.4426950408889634)
    share = share / tl.sum(share, 1)[:, None]
    share = tl.where((expert < EXPERTS)[None, :], share, -1.0)
    nth = tl.arange(0, BLOCK_K)
    kept = tl.zeros((ROWS, BLOCK_K), tl.float32)
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(share, 1, tie_break_left=True)
        kept = tl.where((nth == i)[None, :], tl.max(share, 1)[:, None], kept)
        chosen = tl.where((nth == i)[None, :], best[:, None], chosen)
        share = tl.where(expert[None, :] == best[:, None], -1.0, share)
    if RENORMALIZE:
        kept = kept / tl.sum(kept, 1)[:, None]
    at = token[:, None] * TOP_K + nth[None, :]
    out_mask = (token < tokens)[:, None] & (nth < TOP_K)[None, :]
    tl.store(weights + at, kept, mask=out_mask)
    tl.store(experts + at, chosen, mask=out_mask)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(experts, counts, pairs, BLOCK: tl.constexpr):
    """One expert a program: its number of pairs."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        found += (tl.load(experts + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["pairs"])
def place_kernel(
    experts,
    counts,
    order,
    block_expert,
    used,
    pairs,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One expert a program: write its pairs to its blocks in their order, and its number to ``block_expert``."""
    expert = tl.program_id(0)
    number = tl.arange(0, BLOCK_E)
    blocks = (tl.load(counts + number, mask=number < EXPERTS, other=0) + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(number < expert, blocks, 0), 0)
    count = tl.load(counts + expert)
    mine = (count + BLOCK_M - 1) // BLOCK_M
    if expert == 0:
        tl.store(used, tl.sum(blocks, 0))
    written = 0
    for start in tl.range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hit = (tl.load(experts + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + first * BLOCK_M + written + tl.cumsum(hit, 0) - 1, pair, mask=hit > 0)
        written += tl.sum(hit, 0)
    spare = count + tl.arange(0, BLOCK_M)
    tl.store(order + first * BLOCK_M + spare, pairs + tl.zeros((BLOCK_M,), tl.int32), mask=spare < mine * BLOCK_M)
    for start in tl.range(0, mine, BLOCK):
        block = start + tl.arange(0, BLOCK)
        tl.store(block_expert + first + block, expert + tl.zeros((BLOCK,), tl.int32), mask=block < mine)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def grouped_kernel(
    x,
    weight,
    out,
    order,
    block_expert,
    used,
    pairs,
    blocks,
    columns,
    depth,
    x_row,
    weight_expert,
    weight_row,
    PER_TOKEN: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[pair] = x[pair // PER_TOKEN] @ weight[expert].T for one block of pairs and BLOCK_N columns.

    GATED: the weight has 2 * columns rows, and out is ``silu(first half) * second half``. EVEN: BLOCK_K divides depth.
    """
    program = tl.program_id(0)
    across = (columns + BLOCK_N - 1) // BLOCK_N
    # GROUP blocks of pairs go through a stripe of weights together, while it is in the cache.
    group = program // (GROUP * across)
    height = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    block = group * GROUP + inside % height
    if block < tl.load(used):
        pair = tl.load(order + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        real = pair < pairs
        expert = tl.load(block_expert + block).to(tl.int64)
        column = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
        step = tl.arange(0, BLOCK_K)
        x_at = x + (pair // PER_TOKEN)[:, None] * x_row + step[None, :]
        first_at = weight + expert * weight_expert + column[:, None].to(tl.int64) * weight_row + step[None, :]
        second_at = (
            weight + expert * weight_expert + (column + columns)[:, None].to(tl.int64) * weight_row + step[None, :]
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        wanted = (column < columns)[:, None]
        for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            if EVEN:
                rows_in = tl.load(x_at + start, mask=real[:, None], other=0.0)
                first_in = tl.load(first_at + start, mask=wanted, other=0.0)
            else:
                left = (step < depth - start)[None, :]
                rows_in = tl.load(x_at + start, mask=real[:, None] & left, other=0.0)
                first_in = tl.load(first_at + start, mask=wanted & left, other=0.0)
            acc = tl.dot(rows_in, tl.trans(first_in), acc, input_precision="ieee")
            if GATED:
                if EVEN:
                    second_in = tl.load(second_at + start, mask=wanted, other=0.0)
                else:
                    second_in = tl.load(second_at + start, mask=wanted & left, other=0.0)
                second = tl.dot(rows_in, tl.trans(second_in), second, input_precision="ieee")
        dtype = out.dtype.element_ty
        result = acc.to(dtype)
        if GATED:
            active = silu(result.to(tl.float32)).to(dtype).to(tl.float32)
            result = (active * second.to(dtype).to(tl.float32)).to(dtype)
        tl.store(
            out + pair[:, None] * columns + column[None, :], result, mask=real[:, None] & (column < columns)[None, :]
        )


@triton.jit
def combine_kernel(results, weights, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One token along axis 0, BLOCK columns along axis 1: the weighted sum of its experts, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for nth in tl.static_range(TOP_K):
        pair = token * TOP_K + nth
        result = tl.load(results + pair * width + column, mask=mask, other=0.0).to(tl.float32)
        total += result * tl.load(weights + pair)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=mask)


class MoeConfig(NamedTuple):
    """Build of one grouped product."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    stages: int
    warps: int


def moe_config(arch: int, itemsize: int, pairs: int, experts: int, gated: bool) -> MoeConfig:
    """Choose by the mean number of an expert's pairs.

    Few: the weights' bytes decide, tiles are long in them; many: the matrix
    unit does, tiles are square. A gated product keeps two accumulators, so its tiles are half as wide."""
    mean = pairs / experts
    if itemsize == 4 or arch == INTERPRETER:
        return MoeConfig(16, 32, 32, 1, 3, 4)
    large = arch // 10 in (9, 10)
    if mean <= 16:
        return MoeConfig(16, 64, 128, 1, (3 if gated else 4) if large else 2 if gated else 3, 4)
    if mean <= 48:
        return MoeConfig(32, 64, 128 if large else 64, 1, 3, 4)
    if mean <= 128 or not large:
        return MoeConfig(64, 64 if gated else 128, 64, 8, 4 if large else 3, 4 if large or gated else 8)
    return MoeConfig(128, 64 if gated else 128, 64, 8, 4, 8)


def _product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    blocks: tuple[Tensor, Tensor, Tensor],
    pairs: int,
    most: int,
    per_token: int,
    gated: bool,
    config: MoeConfig,
) -> None:
    columns, depth = out.shape[1], x.shape[1]
    order, block_expert, used = blocks
    grouped_kernel[(most * cdiv(columns, config.block_n),)](
        x,
        weight,
        out,
        order,
        block_expert,
        used,
        pairs,
        most,
        columns,
        depth,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        PER_TOKEN=per_token,
        GATED=gated,
        EVEN=depth % config.block_k == 0,
        GROUP=config.group,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """(float32[n, top_k] weights, int32[n, top_k] experts) of each token, the largest weight first."""
    tokens, experts = router_logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=router_logits.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=router_logits.device)
    block = next_power_of_2(experts)
    per_program = max(1, min(1024 // block, 8))
    route_kernel[(cdiv(tokens, per_program),)](
        router_logits,
        weights,
        chosen,
        tokens,
        router_logits.stride(0),
        EXPERTS=experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        BLOCK_E=block,
        BLOCK_K=next_power_of_2(top_k),
        ROWS=per_program,
        num_warps=4,
    )
    return weights, chosen


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks that suffice however the pairs fall: every block holds a pair, and each expert fills up at most one."""
    return min(pairs, pairs // block_m + experts)


def sort_by_expert(chosen: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order: int32[blocks * block_m] of pairs, block_expert: int32[blocks], used: int32[1] blocks that hold pairs)."""
    pairs = chosen.numel()
    most = most_blocks(pairs, experts, block_m)
    counts = torch.empty(experts, dtype=torch.int32, device=chosen.device)
    order = torch.empty(most * block_m, dtype=torch.int32, device=chosen.device)
    block_expert = torch.empty(most, dtype=torch.int32, device=chosen.device)
    used = torch.empty(1, dtype=torch.int32, device=chosen.device)
    block = 2048
    count_kernel[(experts,)](chosen, counts, pairs, BLOCK=block, num_warps=4)
    place_kernel[(experts,)](
        chosen,
        counts,
        order,
        block_expert,
        used,
        pairs,
        EXPERTS=experts,
        BLOCK_E=next_power_of_2(experts),
        BLOCK_M=block_m,
        BLOCK=block,
        num_warps=4,
    )
    return order, block_expert, used


def moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, renormalize: bool) -> Tensor:
    """Launch the six kernels of one layer. Arguments as in the operator."""
    tokens, width = x.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    experts, inner_width = len(gate_up), down.shape[2]
    pairs = tokens * top_k
    into = moe_config(arch(x.device), x.element_size(), pairs, experts, gated=True)
    back = moe_config(arch(x.device), x.element_size(), pairs, experts, gated=False)
    weights, chosen = route(router_logits, top_k, renormalize)
    blocks = sort_by_expert(chosen, experts, into.block_m)
    most = most_blocks(pairs, experts, into.block_m)
    inner = torch.empty((pairs, inner_width), dtype=x.dtype, device=x.device)
    _product(x, gate_up, inner, blocks, pairs, most, top_k, True, into)
    results = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    _product(inner, down, results, blocks, pairs, most, 1, False, back)
    block = min(2048, next_power_of_2(width))
    combine_kernel[(tokens, cdiv(width, block))](
        results, weights, out, width, TOP_K=top_k, BLOCK=block, num_warps=max(1, min(8, block // 256))
    )
    return out
