"""Choosing tokens from logits in about one pass over the vocabulary, whatever the filters.

One program takes one row. Its pass keeps, for every GROUP neighbouring tokens, their largest logit. That is what makes
filters cheap afterwards:

* Tokens above a bound lie in groups whose maximum is above it. The k-th largest group maximum is a lower bound of the
  k-th largest logit, so about k groups hold the top k; only they are read again.
* The draw is an argmax over logits plus noise. If the winner among more tokens than the filters leave is itself one that
  they leave, it is the winner among those too. So the winner over the whole vocabulary, which the pass finds, is checked:
  it stays if the probability above it is less than top_p. If not, nothing at or below it stays, and the next winner is
  sought above it, in the few groups that reach so high, from the same noise.

No launch depends on a value that the host would have to wait for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2

GROUP = 32
"""Tokens of a group. Small enough that the groups of the top k hold few others, large enough that the maxima are few."""
STAGES = 6
"""Steps of the pass whose logits are on their way at once, less one."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
"""Below any logit but -inf, and finite, so that differences are no NaN."""
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def mix(x):
    """The 32-bit finaliser of the reference's noise, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, position):
    """Return what a row's noise depends on besides the token, from int64 seed and position: their low 32 bits."""
    return seed.to(tl.uint32) ^ mix(position.to(tl.uint32))


@triton.jit
def noise_bits(key, token):
    """uint32 of uniform bits for each token."""
    return mix(key ^ mix(token.to(tl.uint32) + 0x9E3779B9))


@triton.jit
def gumbel(key, token):
    """Standard Gumbel noise divided by ln 2, for scores in powers of two."""
    uniform = (noise_bits(key, token).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.99999994)
    # -log(1 - u). Large noise comes of small u, where 1 - u would have lost its digits: a series is exact there.
    wait = tl.where(
        uniform < 0.01,
        uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333333333333)),
        -0.6931471805599453 * tl.log2(1.0 - uniform),
    )
    return -tl.log2(wait)


@triton.jit
def _row_pass(
    base,
    maxima,
    vocab,
    key,
    scale,
    NOISE: tl.constexpr,
    MAXIMA: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read a row once: (winning token, largest logit, sum of exp2((logit - largest) * scale)).

    NOISE: the winner is of ``logit * scale + noise``, else of the logits. MAXIMA: write those of the groups. MASS: sum up;
    else the sum is 0. The largest logit is known with MASS or without NOISE.
    """
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    # Lanes keep results of their own; they are brought together once, at the end.
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        token = start + lane
        value = tl.load(base + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        score = value * scale + gumbel(key, token) if NOISE else value
        better = score > best
        best_at = tl.where(better, token, best_at)
        best = tl.where(better, score, best)
        if MAXIMA:
            groups = tl.max(tl.reshape(value, (BLOCK // GROUP, GROUP)), 1)
            tl.store(maxima + start // GROUP + tl.arange(0, BLOCK // GROUP), groups)
        if MASS:
            # One of the two powers in a running sum of exponentials is always 1.
            step = tl.exp2(-tl.abs(value - largest) * scale)
            mass = tl.where(value > largest, mass * step + 1.0, mass + step)
            largest = tl.maximum(largest, value)
    top_score = tl.max(best, 0)
    winner = tl.min(tl.where(best == top_score, best_at, NO_TOKEN), 0)
    if MASS:
        top = tl.max(largest, 0)
        total = tl.sum(mass * tl.exp2((largest - top) * scale), 0)
    else:
        top = top_score
        total = 0.0
    return winner, top, total


@triton.jit
def _kth_largest(
    base,
    selected,
    elements,
    vocab,
    k,
    low,
    high,
    enough,
    INDIRECT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The k-th largest of ``elements`` >= k values: those at ``base``, or of the ``selected`` groups of it.

    It is known to lie in ``low .. high``; ``high`` is one of the values, ``low`` is too or is -inf. A result smaller than
    asked for does if no more than ``enough`` values lie at or above it.
    """
    lane = tl.arange(0, BLOCK)
    while low < high:
        middle = low * 0.5 + high * 0.5
        # Between neighbouring numbers the mean may round up; the bracket must shrink either way.
        middle = tl.where(middle >= high, low, middle)
        above = tl.zeros((BLOCK,), tl.int32)
        least_above = tl.full((BLOCK,), float("inf"), tl.float32)
        most_below = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in tl.range(0, elements, BLOCK):
            element = start + lane
            inside = element < elements
            if INDIRECT:
                index = tl.load(selected + element // GROUP, mask=inside, other=0) * GROUP + element % GROUP
                inside = inside & (index < vocab)
            else:
                index = element
            value = tl.load(base + index, mask=inside, other=float("-inf")).to(tl.float32)
            over = value > middle
            above += over.to(tl.int32)
            least_above = tl.minimum(least_above, tl.where(over, value, float("inf")))
            most_below = tl.maximum(most_below, tl.where(over, float("-inf"), value))
        count = tl.sum(above, 0)
        if count >= k:
            low = tl.min(least_above, 0)
            if count <= enough:
                high = low
        else:
            high = tl.max(most_below, 0)
    return low


@triton.jit
def _select(maxima, selected, groups, bound, BLOCK: tl.constexpr):
    """List the groups whose maximum is at least ``bound``, in order; returns how many."""
    count = 0
    for start in tl.range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        hit = (group < groups) & (tl.load(maxima + group, mask=group < groups, other=float("-inf")) >= bound)
        tl.store(selected + count + tl.cumsum(hit.to(tl.int32), 0) - 1, group, mask=hit)
        count += tl.sum(hit.to(tl.int32), 0)
    return count


@triton.jit
def _bound_of_top(maxima, groups, k, top, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """A number that at least k logits of the row reach, and about as many groups."""
    bound = tl.minimum(top, float("-inf"))
    if k <= groups:
        bound = _kth_largest(maxima, maxima, groups, groups, k, bound, top, k + k // 2, False, BLOCK, GROUP)
    return bound


# Positions are part of a packed array: a variant for each alignment would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["positions"])
def sample_kernel(
    logits,
    tokens,
    maxima,
    selected,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    positions,
    row_stride,
    group_stride,
    vocab,
    NOISE: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row a program. NOISE: some temperature is above 0; FILTERED: some row has a filter (and then NOISE)."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    maxima += row * group_stride
    selected += row * group_stride
    if not NOISE:
        winner, top, total = _row_pass(base, maxima, vocab, 0, 1.0, False, False, False, BLOCK, GROUP, STAGES)
    else:
        heat = tl.load(temperature + row)
        # Scores are in powers of two.
        scale = LOG2_E / tl.maximum(heat, 1e-6)
        key = noise_key(tl.load(seeds + row), tl.load(positions + row))
        k = tl.load(top_k + row) if FILTERED else 0
        by_rank = (k > 0) & (k < vocab)
        # The noise is most of the work. Greedy rows need none, and those with a top_k only for what that leaves.
        if (heat <= 0) | by_rank:
            winner, top, total = _row_pass(
                base, maxima, vocab, key, scale, False, FILTERED, False, BLOCK, GROUP, STAGES
            )
        else:
            winner, top, total = _row_pass(
                base, maxima, vocab, key, scale, True, FILTERED, FILTERED, BLOCK, GROUP, STAGES
            )
    if FILTERED:
        share = tl.load(top_p + row)
        least = tl.load(min_p + row)
        if (heat > 0) & (by_rank | (share < 1.0) | (least > 0.0)):
            # The maxima were written by other threads of this program.
            tl.debug_barrier()
            lane = tl.arange(0, SMALL)
            groups = (vocab + GROUP - 1) // GROUP
            floor = top + tl.log2(least) / scale
            floor = tl.where(least > 0.0, floor, float("-inf"))
            # With a top_k nothing was drawn yet: the first winner is sought above -inf.
            value = tl.where(by_rank, float("-inf"), tl.load(base + winner).to(tl.float32))
            bound = tl.maximum(value, floor)
            if by_rank:
                bound = _bound_of_top(maxima, groups, k, top, SMALL, GROUP)
            elements = _select(maxima, selected, groups, bound, SMALL) * GROUP
            tl.debug_barrier()
            if by_rank:
                kth = _kth_largest(base, selected, elements, vocab, k, bound, top, 0, True, SMALL, GROUP)
                floor = tl.maximum(floor, kth)
                # top_p is a share of what top_k left.
                kept = tl.zeros((SMALL,), tl.float32)
                for start in tl.range(0, elements, SMALL):
                    element = start + lane
                    inside = element < elements
                    index = tl.load(selected + element // GROUP, mask=inside, other=0) * GROUP + element % GROUP
                    x = tl.load(base + index, mask=inside & (index < vocab), other=float("-inf")).to(tl.float32)
                    kept += tl.where(x >= kth, tl.exp2((x - top) * scale), 0.0)
                total = tl.sum(kept, 0)

            settled = (value >= floor) & (share >= 1.0) & (by_rank == 0)
            while settled == 0:
                above = tl.zeros((SMALL,), tl.float32)
                best = tl.full((SMALL,), float("-inf"), tl.float32)
                best_at = tl.zeros((SMALL,), tl.int32)
                for start in tl.range(0, elements, SMALL):
                    element = start + lane
                    inside = element < elements
                    index = tl.load(selected + element // GROUP, mask=inside, other=0) * GROUP + element % GROUP
                    x = tl.load(base + index, mask=inside & (index < vocab), other=float("-inf")).to(tl.float32)
                    over = x > value
                    above += tl.where(over, tl.exp2((x - top) * scale), 0.0)
                    score = tl.where(over & (x >= floor), x * scale + gumbel(key, index), float("-inf"))
                    better = score > best
                    best_at = tl.where(better, index, best_at)
                    best = tl.where(better, score, best)
                next_best = tl.max(best, 0)
                stays = (value >= floor) & (tl.sum(above, 0) < share * total)
                # Nothing above it: the likeliest token always stays.
                settled = stays | (next_best == float("-inf"))
                if settled == 0:
                    winner = tl.min(tl.where(best == next_best, best_at, NO_TOKEN), 0)
                    value = tl.load(base + winner).to(tl.float32)
                    settled = (value >= floor) & (share >= 1.0)
    tl.store(tokens + row, winner.to(tl.int64))


@triton.jit
def logprobs_kernel(
    logits,
    tokens,
    chosen,
    values,
    ids,
    maxima,
    selected,
    row_stride,
    group_stride,
    vocab,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row a program: the log probability of its token, and the TOP largest with their ids, lower ids first in a tie."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    maxima += row * group_stride
    selected += row * group_stride
    _, top, total = _row_pass(base, maxima, vocab, 0, LOG2_E, False, TOP > 0, True, BLOCK, GROUP, STAGES)
    normal = top + tl.log(total)
    tl.store(chosen + row, tl.load(base + tl.load(tokens + row)).to(tl.float32) - normal)
    if TOP > 0:
        tl.debug_barrier()
        groups = (vocab + GROUP - 1) // GROUP
        bound = _bound_of_top(maxima, groups, TOP, top, SMALL, GROUP)
        elements = _select(maxima, selected, groups, bound, SMALL) * GROUP
        tl.debug_barrier()
        last = tl.maximum(top, float("inf"))
        last_at = -1
        for nth in tl.range(0, TOP):
            best = tl.full((SMALL,), float("-inf"), tl.float32)
            best_at = tl.full((SMALL,), NO_TOKEN, tl.int32)
            for start in tl.range(0, elements, SMALL):
                element = start + tl.arange(0, SMALL)
                inside = element < elements
                index = tl.load(selected + element // GROUP, mask=inside, other=0) * GROUP + element % GROUP
                inside = inside & (index < vocab)
                x = tl.load(base + index, mask=inside, other=float("-inf")).to(tl.float32)
                left = inside & ((x < last) | ((x == last) & (index > last_at)))
                better = left & ((x > best) | (best_at == NO_TOKEN))
                best_at = tl.where(better, index, best_at)
                best = tl.where(better, x, best)
            last = tl.max(best, 0)
            last_at = tl.min(tl.where(best == last, best_at, NO_TOKEN), 0)
            tl.store(values + row * TOP + nth, last - normal)
            tl.store(ids + row * TOP + nth, last_at.to(tl.int64))


@triton.jit
def penalize_kernel(
    logits,
    output_counts,
    in_prompt,
    repetition,
    presence,
    frequency,
    row_stride,
    count_stride,
    prompt_stride,
    repetition_stride,
    presence_stride,
    frequency_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """One row along axis 0, BLOCK tokens along axis 1, in place. A row without penalties is not read."""
    row = tl.program_id(0).to(tl.int64)
    repeated = tl.load(repetition + row * repetition_stride)
    present = tl.load(presence + row * presence_stride)
    frequent = tl.load(frequency + row * frequency_stride)
    if (repeated != 1.0) | (present != 0.0) | (frequent != 0.0):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = token < vocab
        logit = tl.load(logits + row * row_stride + token, mask=mask, other=0.0)
        count = tl.load(output_counts + row * count_stride + token, mask=mask, other=0)
        prompt = tl.load(in_prompt + row * prompt_stride + token, mask=mask, other=0)
        scaled = tl.where(logit > 0, logit / repeated, logit * repeated)
        logit = tl.where((prompt != 0) | (count > 0), scaled, logit)
        logit = logit - frequent * count.to(tl.float32) - tl.where(count > 0, present, 0.0)
        tl.store(logits + row * row_stride + token, logit, mask=mask)


def blocks(vocab: int, block: int | None) -> tuple[dict[str, int], int]:
    """(tile sizes: elements of a step of the pass and of the steps over selected groups, stages of the pass; warps)."""
    # Eight warps of eight logits a thread: two programs of the largest kernel fit a multiprocessor's registers, so that up
    # to 264 rows run side by side on an H200, with 40 KB of bfloat16 logits on their way to each multiprocessor.
    wide = block or min(2048, max(2 * GROUP, next_power_of_2(vocab)))
    return {"BLOCK": wide, "SMALL": wide, "GROUP": GROUP, "STAGES": STAGES}, max(1, min(8, wide // 256))


def _scratch(rows: int, vocab: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(maxima of groups, numbers of selected groups), rows of equal stride; a whole block's maxima are written."""
    groups = cdiv(vocab, block) * block // GROUP
    return (
        torch.empty((rows, groups), dtype=torch.float32, device=device),
        torch.empty((rows, groups), dtype=torch.int32, device=device),
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    all_greedy: bool = False,
    filtered: bool = True,
    block: int | None = None,
) -> Tensor:
    """Launch. Arguments as in the operator; ``block``, a power of two >= 2 * GROUP, overrides the configuration."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    filtered = filtered and not all_greedy
    tiles, warps = blocks(vocab, block)
    maxima, selected = _scratch(rows if filtered else 1, vocab, tiles["BLOCK"], logits.device)
    sample_kernel[(rows,)](
        logits,
        tokens,
        maxima,
        selected,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        logits.stride(0),
        maxima.stride(0),
        vocab,
        NOISE=not all_greedy,
        FILTERED=filtered,
        **tiles,
        num_warps=warps,
    )
    return tokens


def logprobs(logits: Tensor, tokens: Tensor, top: int, *, block: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch. Arguments as in the operator; ``block`` as in :func:`sample`."""
    rows, vocab = logits.shape
    chosen = torch.empty(rows, dtype=torch.float32, device=logits.device)
    values = torch.empty((rows, top), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, top), dtype=torch.int64, device=logits.device)
    if rows:
        tiles, warps = blocks(vocab, block)
        maxima, selected = _scratch(rows, vocab, tiles["BLOCK"], logits.device)
        logprobs_kernel[(rows,)](
            logits,
            tokens,
            chosen,
            values,
            ids,
            maxima,
            selected,
            logits.stride(0),
            maxima.stride(0),
            vocab,
            TOP=top,
            **tiles,
            num_warps=warps,
        )
    return chosen, values, ids


def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Launch over float32 logits [n, v], in place."""
    rows, vocab = logits.shape
    if logits.numel():
        block = min(4096, next_power_of_2(vocab))
        # Booleans are bytes of 0 and 1; as such they load in wide pieces.
        prompt = in_prompt.view(torch.uint8)
        penalize_kernel[(rows, cdiv(vocab, block))](
            logits,
            output_counts,
            prompt,
            repetition,
            presence,
            frequency,
            logits.stride(0),
            output_counts.stride(0),
            prompt.stride(0),
            repetition.stride(0),
            presence.stride(0),
            frequency.stride(0),
            vocab,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
