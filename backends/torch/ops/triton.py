"""Every operator as Triton kernels: the functions and arguments of :mod:`backends.torch.ops.reference`.

Each function checks its arguments on the host (dtypes, shapes, strides; never values, which would wait for the device),
then launches. What the kernels do not take raises TypeError or ValueError: nothing is computed some other way instead.
Any of these can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import (
    activation,
    kv_store,
    norm,
    sampling,
)
from ..kernels import (
    decode_attention as decode,
)
from ..kernels import (
    fp8_linear as fp8,
)
from ..kernels import (
    moe as experts,
)
from ..kernels import (
    prefill_attention as prefill,
)
from ..kernels import (
    rope as rotary,
)
from ..kernels.common import check_contiguous, check_dtype, check_float, check_last_stride, check_shape


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis. x: [..., d]; weight: [d] of the same dtype."""
    check_float("x", x)
    check_dtype("weight", weight, x.dtype)
    check_shape("weight", weight, x.shape[-1])
    check_contiguous("weight", weight)
    check_last_stride("x", x)
    if x.dim() not in (2, 3):
        check_contiguous("x", x)
    return norm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
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
    return norm.add_rms_norm(x, residual, weight, eps)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate halves by position, in place. q: [n, h, d]; k: [n, hk, d]; positions: int64[n]; cos_sin: float32[max, r],
    the cosines of r/2 angles, then the sines; the first r <= d elements of a head are rotated."""
    check_float("q", q)
    check_dtype("k", k, q.dtype)
    check_dtype("positions", positions, torch.int64)
    check_dtype("cos_sin", cos_sin, torch.float32)
    check_shape("q", q, None, None, None)
    check_shape("k", k, len(q), None, q.shape[2])
    check_shape("positions", positions, len(q))
    check_shape("cos_sin", cos_sin, None, None)
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > q.shape[2]:
        raise ValueError(f"cos_sin: width {cos_sin.shape[1]} is odd or more than the head size {q.shape[2]}")
    check_contiguous("positions", positions)
    check_contiguous("cos_sin", cos_sin)
    check_last_stride("q", q)
    check_last_stride("k", k)
    rotary.rope(q, k, positions, cos_sin)
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :m]) * x[:, m:]``. x: [n, 2m] -> [n, m]."""
    check_float("x", x)
    check_shape("x", x, None, None)
    if x.shape[1] % 2:
        raise ValueError(f"x: {x.shape[1]} columns are not two halves")
    check_last_stride("x", x)
    return activation.silu_and_mul(x)


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, scale_columns: int) -> Tensor:
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
    return fp8.fp8_linear(x, weight, scales, scale_columns)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's keys and values to its slot. k, v: [n, hk, d]; caches: [s, hk, d]; slots: int64[n]."""
    check_float("k", k)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(name, tensor, k.dtype)
        check_last_stride(name, tensor)
    check_last_stride("k", k)
    check_dtype("slots", slots, torch.int64)
    check_shape("k", k, None, None, None)
    check_shape("v", v, *k.shape)
    check_shape("k_cache", k_cache, None, *k.shape[1:])
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_shape("slots", slots, len(k))
    check_contiguous("slots", slots)
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"v_cache: strides {v_cache.stride()} are not those of k_cache, {k_cache.stride()}")
    kv_store.store_kv(k, v, k_cache, v_cache, slots)


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
) -> Tensor:
    """One query a request over its whole context, its own token included (already stored).

    q: [b, h, d]; rows: int64[b]; seq_lens: int32[b]; ``window``: only the last so many tokens. Returns [b, h, d]; zeros
    where a sequence length is 0.
    """
    _check_attention(q, k_cache, v_cache, page_table, rows, seq_lens, page_size, window)
    check_shape("q", q, len(rows), None, None)
    return decode.decode_attention(
        q, k_cache, v_cache, page_table, rows, seq_lens, page_size=page_size, scale=scale, window=window
    )


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
) -> Tensor:
    """Causal attention of several requests' new tokens over their cached prefix and themselves (already stored).

    q: [n, h, d], the requests' new tokens one after another; q_starts: int32[b + 1], where each request's begin;
    seq_lens: int32[b], context after them; ``max_extend``: no extension is longer. The token at position p sees positions
    ``p - window + 1 .. p`` (all up to p without a window). Returns [n, h, d].
    """
    _check_attention(q, k_cache, v_cache, page_table, rows, seq_lens, page_size, window)
    check_dtype("q_starts", q_starts, torch.int32)
    check_shape("q_starts", q_starts, len(rows) + 1)
    check_contiguous("q_starts", q_starts)
    return prefill.prefill_attention(
        q,
        k_cache,
        v_cache,
        page_table,
        rows,
        q_starts,
        seq_lens,
        max_extend=max_extend,
        page_size=page_size,
        scale=scale,
        window=window,
    )


def moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, renormalize: bool) -> Tensor:
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
    return experts.moe(x, router_logits, gate_up, down, top_k=top_k, renormalize=renormalize)


def _check_logits(logits: Tensor) -> None:
    check_dtype("logits", logits, torch.float32)
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


def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Apply the three penalties to float32 logits [n, v] in place.

    output_counts: int32[n, v], occurrences in the output; in_prompt: bool[n, v]; the rest float32[n], of any stride, so
    that columns of one table will do. Repetition first (over prompt and output), then frequency and presence (over the
    output).
    """
    _check_logits(logits)
    check_dtype("output_counts", output_counts, torch.int32)
    check_dtype("in_prompt", in_prompt, torch.bool)
    for name, tensor in (("output_counts", output_counts), ("in_prompt", in_prompt)):
        check_shape(name, tensor, *logits.shape)
        check_last_stride(name, tensor)
    numbers = {"repetition": repetition, "presence": presence, "frequency": frequency}
    _check_per_row(len(logits), torch.float32, strided=True, **numbers)
    sampling.penalize(logits, output_counts, in_prompt, repetition, presence, frequency)


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
) -> Tensor:
    """One token a row: argmax where temperature is 0, else a draw from what the three filters leave.

    logits: float32[n, v]; temperature, top_p, min_p: float32[n]; top_k: int32[n], 0 for none; seeds: int64[n];
    positions: int64[n], the index of the sampled token in its sequence. ``all_greedy`` promises that every temperature is
    0, ``filtered=False`` that no row has a filter: both save work that the host cannot see to be needless. Filters and
    noise are those of the reference; of equal scores the lower token wins. Returns int64[n].
    """
    _check_logits(logits)
    _check_per_row(len(logits), torch.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_per_row(len(logits), torch.int32, top_k=top_k)
    _check_per_row(len(logits), torch.int64, seeds=seeds, positions=positions)
    return sampling.sample(
        logits, temperature, top_k, top_p, min_p, seeds, positions, all_greedy=all_greedy, filtered=filtered
    )


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities before temperature and filters: (of ``tokens``, float32[n]; the ``top`` largest, float32[n, top];
    their ids, int64[n, top], lower ones first in a tie). logits: float32[n, v]; tokens: int64[n]."""
    _check_logits(logits)
    _check_per_row(len(logits), torch.int64, tokens=tokens)
    if not 0 <= top <= logits.shape[1]:
        raise ValueError(f"top: {top} is not between 0 and the {logits.shape[1]} tokens of the vocabulary")
    return sampling.logprobs(logits, tokens, top)
