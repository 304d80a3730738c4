"""Samples by script: every request writes what its trace says it wrote."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch

END_OF_SEQUENCE = -2
"""Token id that ends a request in simulation. No vocabulary has it, so content from a trace cannot end one early."""
_BLOCK = np.arange(16)[:, None]
"""Steps looked up at once."""


class ScriptedSampler:
    """Returns each request's next scripted token, for all rows of a batch at once.

    ``script(request_id)`` gives the prompt length and int32[n] output tokens; the caller ends them with
    :data:`END_OF_SEQUENCE` where the model would stop.
    """

    def __init__(self, script: Callable[[str], tuple[int, np.ndarray]], rows: int) -> None:
        self._script = script
        self._tokens = np.zeros((rows, 1024), np.int32)
        self._flat = self._tokens.reshape(-1)
        self._prompt_lens = np.zeros(rows, np.int64)
        self._rows: np.ndarray | None = None
        self._ahead: list[np.ndarray] = []
        self._context_tokens = 0

    def load(self, batch: ModelWorkerBatch) -> None:
        """Take in the scripts of the requests that start in a batch."""
        for row, request_id, *_ in batch.new_requests:
            prompt_len, tokens = self._script(request_id)
            # One more than the script: an overlapped step after the stop samples once more, and is dropped.
            if len(tokens) + 1 > self._tokens.shape[1]:
                grown = np.zeros((len(self._tokens), 2 * len(tokens)), np.int32)
                grown[:, : self._tokens.shape[1]] = self._tokens
                self._tokens, self._flat = grown, grown.reshape(-1)
            self._tokens[row, : len(tokens)] = tokens
            self._prompt_lens[row] = prompt_len
            self._rows = None

    def sample(self, batch: ModelWorkerBatch) -> np.ndarray:
        """int32[n]: output number ``seq_len - prompt_len`` of each row.

        While the same rows decode, a block of the next steps is looked up at once.
        """
        rows = batch.rows
        if rows is self._rows and self._ahead and batch.context_tokens == self._context_tokens + len(rows):
            self._context_tokens = batch.context_tokens
            return self._ahead.pop()
        index = rows * self._tokens.shape[1] - self._prompt_lens[rows] + batch.seq_lens
        if batch.unsampled is not None:
            index[batch.unsampled] = 0  # inside the prompt: there is no output to take
        if rows is not self._rows:
            self._rows = rows
            self._ahead.clear()
            return self._flat[index]
        # The second time: these rows go on. Past the end of a script it reads on in another's, for steps that never come.
        block = self._flat.take(index + _BLOCK, mode="clip")
        self._context_tokens = batch.context_tokens
        self._ahead = list(block[:0:-1])
        return block[0]
