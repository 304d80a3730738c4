"""What grammars forbid, written into logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, next_power_of_2


@triton.jit
def forbid_kernel(logits, indices, masks, logits_row, masks_row, vocab, BLOCK: tl.constexpr):
    """One masked row a program along axis 0, BLOCK tokens along axis 1. Nothing is read of the logits, and only what is
    forbidden is written: 32 neighbours share a word of the mask, so that is read once from memory."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + place)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    word = tl.load(masks + place * masks_row + token // 32, mask=inside, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    nothing = tl.full((BLOCK,), float("-inf"), logits.dtype.element_ty)
    tl.store(logits + row * logits_row + token, nothing, mask=inside & forbidden)


def forbid(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Launch over logits [n, v], in place."""
    vocab = logits.shape[1]
    if len(rows):
        block = min(2048, next_power_of_2(vocab))
        forbid_kernel[(len(rows), cdiv(vocab, block))](
            logits,
            rows,
            masks,
            logits.stride(0),
            masks.stride(0),
            vocab,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
