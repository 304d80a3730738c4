"""Writing new tokens' keys and values to their slots of the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2


@triton.jit
def store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    cache_slot,
    cache_head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program: the keys and values of all its heads, whose HEADS * WIDTH elements BLOCK covers."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    element = tl.arange(0, BLOCK)
    head, column = element // WIDTH, element % WIDTH
    mask = element < HEADS * WIDTH
    keys = tl.load(k + token * k_token + head * k_head + column, mask=mask)
    values = tl.load(v + token * v_token + head * v_head + column, mask=mask)
    at = slot * cache_slot + head * cache_head + column
    tl.store(k_cache + at, keys, mask=mask)
    tl.store(v_cache + at, values, mask=mask)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Launch over k, v: [n, hk, d]; the caches are written at ``slots``. The two caches have the same strides."""
    tokens, heads, width = k.shape
    if tokens == 0:
        return
    block = next_power_of_2(heads * width)
    store_kv_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        HEADS=heads,
        WIDTH=width,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
