"""Every operator in plain torch: the definition that the kernels are tested against, and what runs on a CPU.

Shapes: ``n`` tokens, ``b`` requests, ``h`` query heads, ``hk`` KV heads, ``d`` head size, ``s`` KV slots. A KV slot
holds one token: slot ``page * page_size + offset``. ``page_table`` is int32[rows, pages a row]; a request's pages are
those of its row. Statistics are computed in float32 and results are returned in the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.torch.fp8 import dequantise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis. x: [..., d]; weight: [d]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [n, d]; either may be overwritten."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


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
    """Normalise heads, turn them by position, and write each token's keys and values to its slot; returns the queries.

    q: [n, h, d], which may be overwritten; k, v: [n, hk, d]; q_norm, k_norm: [d], the weights of the RMS norms of heads, or
    None; positions, slots: int64[n]; cos_sin: float32[max, r], the cosines of r/2 angles, then the sines: the first r <= d
    elements of a head are rotated by halves; caches: [s, hk, d].
    """
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        width = cos_sin.shape[-1]
        first, second = x[..., :width].float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)

    k_cache[slots] = rotate(k)
    v_cache[slots] = v
    return rotate(q)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :m]) * x[:, m:]``. x: [n, 2m] -> [n, m]."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def fp8_linear(x: Tensor, weight: Tensor, scales: Tensor, scale_columns: int) -> Tensor:
    """x times a weight in FP8. x: [m, k]; weight: e4m3[n, k]; scales: float32[n, b], of ``scale_columns`` columns each (the
    last block may have fewer). The weight is rounded to x's dtype before the product. Returns [m, n]."""
    return torch.nn.functional.linear(x, dequantise(weight, scales, scale_columns).to(x.dtype))


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

    q: [b, h, d]; rows: int64[b]; seq_lens: int32[b] >= 1; ``window``: only the last so many tokens. Returns [b, h, d].
    """
    starts = torch.arange(len(rows) + 1, device=q.device)
    return prefill_attention(
        q,
        k_cache,
        v_cache,
        page_table,
        rows,
        starts,
        seq_lens,
        max_extend=1,
        page_size=page_size,
        scale=scale,
        window=window,
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
    seq_lens: int32[b], context after them; ``max_extend``: the longest extension, for the launch grid. The token at
    position p sees positions ``p - window + 1 .. p`` (all up to p without a window). Returns [n, h, d].
    """
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[1]
    bounds, lengths = q_starts.tolist(), seq_lens.tolist()
    for i, row in enumerate(rows.tolist()):
        begin, end, length = bounds[i], bounds[i + 1], lengths[i]
        at = torch.arange(length, device=q.device)
        slots = page_table[row, at // page_size].long() * page_size + at % page_size
        keys = k_cache[slots].float().repeat_interleave(group, dim=1)
        values = v_cache[slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        positions = torch.arange(length - (end - begin), length, device=q.device)
        hidden = at[None, :] > positions[:, None]
        if window is not None:
            hidden |= at[None, :] <= positions[:, None] - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, renormalize: bool) -> Tensor:
    """Mixture of gated experts. x: [n, c]; router_logits: [n, e]; gate_up: [e, 2m, c]; down: [e, c, m].

    Each token goes to the ``top_k`` experts of the largest softmax weight; ``renormalize`` makes the chosen weights add up
    to one. Returns [n, c].
    """
    weights, experts = router_logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in experts.unique().tolist():
        tokens, nth = (experts == expert).nonzero(as_tuple=True)
        inner = silu_and_mul(torch.nn.functional.linear(x[tokens], gate_up[expert]))
        result = torch.nn.functional.linear(inner, down[expert]).float()
        out.index_add_(0, tokens, result * weights[tokens, nth, None])
    return out.to(x.dtype)


def penalize(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Apply the three penalties to float32 logits [n, v] in place.

    output_counts: int32[n, v], occurrences in the output; in_prompt: bool[n, v]; the rest float32[n]. Repetition first
    (over prompt and output), then frequency and presence (over the output), as transformers and vLLM do.
    """
    seen = in_prompt | (output_counts > 0)
    scaled = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits.copy_(torch.where(seen, scaled, logits))
    logits.sub_(frequency[:, None] * output_counts).sub_(presence[:, None] * (output_counts > 0))


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

    logits: [n, v]; temperature, top_p, min_p: float32[n]; top_k: int32[n], 0 for none; seeds: int64[n];
    positions: int64[n], the index of the sampled token in its sequence. Filters apply one after another to the softmax of
    logits / temperature: top_k, then top_p of what is left (renormalised), then min_p relative to the largest. Ties at a
    threshold are all kept, and the likeliest token always is. The draw is an argmax over Gumbel noise that depends on
    (seed, position, token) alone, so a request's tokens do not depend on its batch; of a seed and a position the low 32
    bits count. Returns int64[n].

    What the caller knows without asking the device saves work: ``all_greedy`` promises that every temperature is 0,
    ``filtered=False`` that no row has a filter (top_k 0, top_p 1, min_p 0).
    """
    greedy = logits.argmax(-1)
    if all_greedy or not bool((temperature > 0).any()):
        return greedy
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    scores = scaled + gumbel(seeds, positions, logits.shape[1])
    if filtered:
        scores = scores.masked_fill(~keep_mask(scaled.softmax(-1), top_k, top_p, min_p), float("-inf"))
    drawn = scores.argmax(-1)
    return torch.where(temperature > 0, drawn, greedy)


def keep_mask(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """bool[n, v]: the tokens that top-k, top-p and min-p leave. Arguments as in :func:`sample`."""
    ordered = probabilities.sort(-1, descending=True).values
    vocab = probabilities.shape[1]
    last = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).long() - 1
    kept = probabilities >= ordered.gather(1, last[:, None])
    ordered = torch.where(ordered >= ordered.gather(1, last[:, None]), ordered, 0.0)
    share = ordered / ordered.sum(-1, keepdim=True)
    # A token stays while those before it have not yet reached top_p.
    reached = (share.cumsum(-1) - share) >= top_p[:, None]
    reached[:, 0] = False
    floor = ordered.masked_fill(reached, float("inf")).amin(-1, keepdim=True)
    floor = torch.where(top_p[:, None] >= 1, 0.0, floor)
    kept &= probabilities >= floor
    return kept & (probabilities >= min_p[:, None] * ordered[:, :1])


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """float32[n, vocab] of standard Gumbel noise from a counter-based generator: a function of (seed, position, token)."""
    token = torch.arange(vocab, device=seeds.device)
    state = _mix((seeds ^ _mix(positions))[:, None] ^ _mix(token + 0x9E3779B9)[None, :])
    # Strictly between 0 and 1: at 1 the noise would be infinite and its token drawn whatever its logit. Large noise comes
    # of small numbers, where floats are dense, so that it is not one of a few values.
    uniform = ((state.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two rounds of multiply and shift, as in lowbias32), in int64 arithmetic."""
    x = x & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def forbid(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Make impossible, in place, what the masks of some rows do not allow. logits: [n, v] of any float dtype; rows:
    int64[k]; masks: int32[k, ceil(v / 32)], bit ``t % 32`` of word ``t // 32`` set where token t is allowed."""
    bits = (masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
    forbidden = (bits == 0).view(len(rows), -1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities before temperature and filters: (of ``tokens``, float32[n]; the ``top`` largest, float32[n, top];
    their ids, int64[n, top]). logits: [n, v]; tokens: int64[n]."""
    log = logits.float().log_softmax(-1)
    values, ids = log.topk(top, dim=-1) if top else (log[:, :0], tokens.new_empty((len(tokens), 0)))
    return log.gather(1, tokens[:, None])[:, 0], values, ids
