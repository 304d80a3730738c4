"""Masks over the vocabulary: which tokens a row may sample."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from torch import Tensor

from backends.torch.staging import to_device

WORD_BITS = 32


def forbid(logits: Tensor, rows: np.ndarray, masks: np.ndarray, ops: ModuleType) -> None:
    """Make impossible, in place, what a mask does not allow.

    logits: [n, vocab] of any float dtype; rows: int64[k], whose masks these are; masks: int32[k, ceil(vocab / 32)], bit
    ``t % 32`` of word ``t // 32`` set where token t is allowed. On CUDA nothing here waits for the device.
    """
    ops.forbid(logits, to_device(rows, logits.device), to_device(masks, logits.device))
