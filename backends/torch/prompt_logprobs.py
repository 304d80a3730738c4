"""Log probabilities of the tokens of prompts, for the few requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from backends.torch.staging import to_device
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch, NewRequest

AT_ONCE = 512
"""Positions whose logits exist at a time: a prompt's would be a gigabyte for every two thousand of a large vocabulary."""


class PromptLogprobs:
    """What was asked of the prompts that are being computed. A batch without such rows costs one look at a dictionary."""

    def __init__(self, ops: ModuleType, device: torch.device) -> None:
        self._ops, self._device = ops, device
        self._asked: dict[int, tuple[int, np.ndarray]] = {}
        """By row: how many likely tokens, and int32[input tokens] the prompt."""

    def start(self, requests: tuple[NewRequest, ...]) -> None:
        """Take in the requests that start in a batch."""
        for request in requests:
            self._asked.pop(request.row, None)
            if request.params.prompt_logprobs is not None:
                self._asked[request.row] = request.params.prompt_logprobs, request.tokens[: request.input_len]

    def of(
        self, batch: ModelWorkerBatch, hidden: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> dict[int, tuple[int, Logprobs]] | None:
        """By index of a row: the position of the first token told of, and of it and those after it the log probabilities.

        hidden: [tokens, hidden], of the last stage. Waits for the device, which no other batch does.
        """
        if not self._asked or not batch.num_prefill:
            return None
        found: dict[int, tuple[int, Logprobs]] = {}
        at = 0
        for index in range(batch.num_prefill):
            count, row = int(batch.query_lens[index]), int(batch.rows[index])
            first = int(batch.seq_lens[index]) - count
            asked = self._asked.get(row)
            if asked is not None:
                top, prompt = asked
                targets = prompt[first + 1 : first + 1 + count].astype(np.int64)
                if len(targets):
                    found[index] = first + 1, self._told(hidden[at : at + len(targets)], targets, top, logits)
                if first + count >= len(prompt):
                    del self._asked[row]
            at += count
        return found or None

    def _told(self, hidden: Tensor, targets: np.ndarray, top: int, logits: Callable[[Tensor], Tensor]) -> Logprobs:
        parts = []
        for start in range(0, len(targets), AT_ONCE):
            tokens = to_device(targets[start : start + AT_ONCE], self._device)
            parts.append(self._ops.logprobs(logits(hidden[start : start + AT_ONCE]), tokens, top))
        return Logprobs(*(torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)))
