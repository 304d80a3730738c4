"""The third layer of batch: one forward step as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """Inputs of a model's layers in one step. Requests that extend a prompt come first, then those that decode.

    ``n`` tokens in all: ``prefill_tokens`` of the first ``num_prefill`` requests, then one for each decode.
    """

    input_ids: Tensor
    """int64[n]."""
    positions: Tensor
    """int64[n], each token's index in its sequence."""
    slots: Tensor
    """int64[n], the KV slot each token writes."""
    rows: Tensor
    """int64[b], each request's row of ``page_table``."""
    seq_lens: Tensor
    """int32[b], each request's context after this step."""
    page_table: Tensor
    """int32[rows, pages a row]."""
    page_size: int
    num_prefill: int = 0
    prefill_tokens: int = 0
    q_starts: Tensor | None = None
    """int32[num_prefill + 1], where each prefill's tokens begin; None in a batch of decodes alone."""
    max_extend: int = 1
    """Most tokens of one prefill."""
    sample_at: Tensor | None = None
    """int64[m], the tokens whose logits are wanted; None: every token's."""


@dataclass(slots=True)
class KVPool:
    """Keys and values of this stage's layers: one tensor [slots, kv_heads, head_dim] each, a layer at a time.

    Slot ``page * page_size + offset`` holds one token.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def allocate(
        cls, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVPool:
        """A pool of zeros: what is read before it is written must at least be finite."""
        shape = (slots, kv_heads, head_dim)
        return cls(
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)],
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)],
        )
