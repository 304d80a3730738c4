"""Masks over the vocabulary: which tokens a row may sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backends.torch.staging import to_device

WORD_BITS = 32


def forbid(logits: Tensor, rows: np.ndarray, masks: np.ndarray) -> None:
    """Make impossible, in place, what a mask does not allow.

    logits: [n, vocab] of any float dtype; rows: int64[k], whose masks these are; masks: int32[k, ceil(vocab / 32)], bit
    ``t % 32`` of word ``t // 32`` set where token t is allowed. On CUDA nothing here waits for the device.
    """
    device, vocab = logits.device, logits.shape[1]
    words = to_device(masks, device)
    bits = (words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=device)) & 1
    forbidden = (bits == 0).view(len(rows), -1)[:, :vocab]
    at = to_device(rows, device)
    logits[at] = logits[at].masked_fill(forbidden, float("-inf"))
