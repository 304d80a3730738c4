"""Every operator as Triton kernels: the functions and arguments of :mod:`backends.torch.ops.reference`.

Each function here checks its arguments on the host (dtypes, shapes, strides; never values, which would wait for the
device), once for all that are alike; the function named above it launches, and its result is the operator's. What the
kernels do not take raises TypeError or ValueError: nothing is computed some other way instead. Any of these can be captured
in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import activation, sampling
from ..kernels import (
    attention_inputs as inputs,
)
from ..kernels import (
    decode_attention as decode,
)
from ..kernels import (
    forbidding as forbids,
)
from ..kernels import (
    fp8_linear as fp8,
)
from ..kernels import (
    moe as experts,
)
from ..kernels import norm as norms
from ..kernels import (
    prefill_attention as prefill,
)
from ..kernels.common import check_contiguous, check_dtype, check_float, check_last_stride, check_shape, launches


@launches(norms.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """``x / rms(x) * weight`` over the last axis. x: [..., d]; weight: [d] of the same dtype."""
    check_float("x", x)
    check_dtype("weight", weight, x.dtype)
    check_shape("weight", weight, x.shape[-1])
    check_contiguous("weight", weight)
    check_last_stride("x", x)
    if x.dim() not in (2, 3):
        check_contiguous("x", x)


@launches(norms.add_rms_norm)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """(rms_norm(x + residual), x + residual). x, residual: [n, d]; both are overwritten and returned."""
    check_float("x", x)
    check_dtype("residual", residual, x.dtype)
    check_dtype("weight", weight, x.dtype)
    check_shape("x", x, None, None)
    check_shape("residual", residual, *x.shape)
    check_shape("weight", weight, x.shape[-1])
    check_contiguous("weight", weight)
    check_last_stride("x", x)
    check_last_stride("residual", residual)


@launches(inputs.attention_inputs)
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
) -> None:
    """Normalise heads, turn them by position, and write each token's keys and values to its slot; returns the queries.

    q: [n, h, d], which is overwritten; k, v: [n, hk, d]; q_norm, k_norm: [d], the weights of the RMS norms of heads, or
    None; positions, slots: int64[n]; cos_sin: float32[max, r], the cosines of r/2 angles, then the sines: the first r <= d
    elements of a head are rotated by halves; caches: [s, hk, d].
    """
    check_float("q", q)
    check_shape("q", q, None, None, None)
    check_shape("k", k, len(q), None, q.shape[2])
    check_shape("v", v, *k.shape)
    check_shape("k_cache", k_cache, None, *k.shape[1:])
    check_shape("v_cache", v_cache, *k_cache.shape)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, tensor, q.dtype)
        check_last_stride(name, tensor)
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"v_cache: strides {v_cache.stride()} are not those of k_cache, {k_cache.stride()}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: only one of them is given")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_dtype(name, weight, q.dtype)
            check_shape(name, weight, q.shape[2])
            check_contiguous(name, weight)
    _check_per_row(len(q), torch.int64, positions=positions, slots=slots)
    check_dtype("cos_sin", cos_sin, torch.float32)
    check_shape("cos_sin", cos_sin, None, None)
    check_contiguous("cos_sin", cos_sin)
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > q.shape[2]:
        raise ValueError(f"cos_sin: width {cos_sin.shape[1]} is odd or more than the head size {q.shape[2]}")


@launches(activation.silu_and_mul)
def silu_and_mul(x: Tensor) -> None:
    """``silu(x[:, :m]) * x[:, m:]``. x: [n, 2m] -> [n, m]."""
    check_float("x", x)
    check_shape("x", x, None, None)
    if x.shape[1] % 2:
        raise ValueError(f"x: {x.shape[1]} columns are not two halves")
    check_last_stride("x", x)


@launches(fp8.fp8_linear)
def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, scale_columns: int) -> None:
    """x times a weight in FP8. x: [m, k]; weight: e4m3[n, k]; scales: float32[n, b], of ``scale_columns`` columns each (the
    last block may have fewer). Values keep e4m3's precision, scales float32's. Returns [m, n]."""
    check_float("x", x)
    check_dtype("weight", weight, torch.float8_e4m3fn)
    check_dtype("scales", scales, torch.float32)
    check_shape("x", x, None, None)
    check_shape("weight", weight, None, x.shape[1])
    check_shape("scales", scales, len(weight), None)
    for name, tensor in (("x", x), ("weight", weight), ("scales", scales)):
        check_last_stride(name, tensor)
    if -(-x.shape[1] // scale_columns) != scales.shape[1]:
        raise ValueError(f"scales: {scales.shape[1]} of {scale_columns} columns each do not cover {x.shape[1]}")
    if scales.shape[1] > 1 and scale_columns & (scale_columns - 1 | 15):
        raise ValueError(f"scale_columns: {scale_columns} is not a power of two from 16 up")


def _check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    page_size: int,
    window: int | None,
) -> None:
    check_float("q", q)
    check_shape("q", q, None, None, None)
    check_shape("k_cache", k_cache, None, None, q.shape[2])
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_last_stride("q", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, cache, q.dtype)
        check_last_stride(name, cache)
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads are not a multiple of the {k_cache.shape[1]} KV heads")
    check_dtype("page_table", page_table, torch.int32)
    check_shape("page_table", page_table, None, None)
    check_last_stride("page_table", page_table)
    check_dtype("rows", rows, torch.int64)
    check_shape("rows", rows, None)
    check_contiguous("rows", rows)
    check_dtype("seq_lens", seq_lens, torch.int32)
    check_shape("seq_lens", seq_lens, len(rows))
    check_contiguous("seq_lens", seq_lens)
    if page_size < 1:
        raise ValueError(f"page_size: {page_size} is less than 1")
    if window is not None and window < 1:
        raise ValueError(f"window: {window} is less than 1")


@launches(decode.decode_attention)
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
) -> None:
    """One query a request over its whole context, its own token included (already stored).

    q: [b, h, d]; rows: int64[b]; seq_lens: int32[b]; ``window``: only the last so many tokens. Returns [b, h, d]; zeros
    where a sequence length is 0.
    """
    _check_attention(q, k_cache, v_cache, page_table, rows, seq_lens, page_size, window)
    check_shape("q", q, len(rows), None, None)


@launches(prefill.prefill_attention)
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
) -> None:
    """Causal attention of several requests' new tokens over their cached prefix and themselves (already stored).

    q: [n, h, d], the requests' new tokens one after another; q_starts: int32[b + 1], where each request's begin;
    seq_lens: int32[b], context after them; ``max_extend``: no extension is longer. The token at position p sees positions
    ``p - window + 1 .. p`` (all up to p without a window). Returns [n, h, d].
    """
    _check_attention(q, k_cache, v_cache, page_table, rows, seq_lens, page_size, window)
    check_dtype("q_starts", q_starts, torch.int32)
    check_shape("q_starts", q_starts, len(rows) + 1)
    check_contiguous("q_starts", q_starts)


@launches(experts.moe)
def moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, renormalize: bool) -> None:
    """Mixture of gated experts. x: [n, c]; router_logits: [n, e]; gate_up: [e, 2m, c]; down: [e, c, m].

    Each token goes to the ``top_k`` experts of the largest softmax weight, the lower number in a tie; ``renormalize`` makes
    the chosen weights add up to one. Returns [n, c].
    """
    check_float("x", x)
    check_float("router_logits", router_logits)
    check_dtype("gate_up", gate_up, x.dtype)
    check_dtype("down", down, x.dtype)
    check_shape("x", x, None, None)
    check_shape("router_logits", router_logits, len(x), None)
    check_shape("down", down, router_logits.shape[1], x.shape[1], None)
    check_shape("gate_up", gate_up, len(down), 2 * down.shape[2], x.shape[1])
    for name, tensor in (("x", x), ("router_logits", router_logits), ("gate_up", gate_up), ("down", down)):
        check_last_stride(name, tensor)
    if not 1 <= top_k <= len(down):
        raise ValueError(f"top_k: {top_k} is not between 1 and the {len(down)} experts")


def _check_logits(logits: Tensor) -> None:
    check_float("logits", logits)
    check_shape("logits", logits, None, None)
    check_last_stride("logits", logits)
    if logits.shape[1] == 0:
        raise ValueError("logits: the vocabulary is empty")


def _check_per_row(rows: int, dtype: torch.dtype, *, strided: bool = False, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check_dtype(name, tensor, dtype)
        check_shape(name, tensor, rows)
        if not strided:
            check_contiguous(name, tensor)


@launches(sampling.penalize)
def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Apply the three penalties to float32 logits [n, v] in place.

    output_counts: int32[n, v], occurrences in the output; in_prompt: bool[n, v]; the rest float32[n], of any stride, so
    that columns of one table will do. Repetition first (over prompt and output), then frequency and presence (over the
    output).
    """
    _check_logits(logits)
    check_dtype("logits", logits, torch.float32)
    check_dtype("output_counts", output_counts, torch.int32)
    check_dtype("in_prompt", in_prompt, torch.bool)
    for name, tensor in (("output_counts", output_counts), ("in_prompt", in_prompt)):
        check_shape(name, tensor, *logits.shape)
        check_last_stride(name, tensor)
    numbers = {"repetition": repetition, "presence": presence, "frequency": frequency}
    _check_per_row(len(logits), torch.float32, strided=True, **numbers)


@launches(sampling.sample)
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
) -> None:
    """One token a row: argmax where temperature is 0, else a draw from what the three filters leave.

    logits: [n, v] of any float dtype; temperature, top_p, min_p: float32[n]; top_k: int32[n], 0 for none; seeds: int64[n];
    positions: int64[n], the index of the sampled token in its sequence. ``all_greedy`` promises that every temperature is
    0, ``filtered=False`` that no row has a filter: both save work that the host cannot see to be needless. Filters and
    noise are those of the reference; of equal scores the lower token wins. Returns int64[n].
    """
    _check_logits(logits)
    _check_per_row(len(logits), torch.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_per_row(len(logits), torch.int32, top_k=top_k)
    _check_per_row(len(logits), torch.int64, seeds=seeds, positions=positions)


@launches(forbids.forbid)
def forbid(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Make impossible, in place, what the masks of some rows do not allow. logits: [n, v] of any float dtype; rows:
    int64[k]; masks: int32[k, ceil(v / 32)], bit ``t % 32`` of word ``t // 32`` set where token t is allowed."""
    _check_logits(logits)
    check_dtype("rows", rows, torch.int64)
    check_shape("rows", rows, None)
    check_contiguous("rows", rows)
    check_dtype("masks", masks, torch.int32)
    check_shape("masks", masks, len(rows), -(-logits.shape[1] // 32))
    check_contiguous("masks", masks)


@launches(sampling.logprobs)
def logprobs(logits: Tensor, tokens: Tensor, top: int) -> None:
    """Log probabilities before temperature and filters: (of ``tokens``, float32[n]; the ``top`` largest, float32[n, top];
    their ids, int64[n, top], lower ones first in a tie). logits: [n, v] of any float dtype; tokens: int64[n]."""
    _check_logits(logits)
    _check_per_row(len(logits), torch.int64, tokens=tokens)
    if not 0 <= top <= logits.shape[1]:
        raise ValueError(f"top: {top} is not between 0 and the {logits.shape[1]} tokens of the vocabulary")
