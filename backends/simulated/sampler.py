"""Samples by script: every request writes what its trace says it wrote."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch, StepOutput, step_numbers


class ScriptedSampler:
    """Sampler of each request's next scripted token, for all rows of a batch at once.

    ``script(request_id)`` gives the prompt length and int32[n] output tokens; the caller ends them with
    its end of sequence where the model would stop.
    """

    def __init__(self, script: Callable[[str], tuple[int, np.ndarray]], rows: int) -> None:
        self._script = script
        # A row more than there are: steps past the end of the last request's output are inside, too.
        self._tokens = np.zeros((rows + 1, 1024), np.int32)
        self._flat = self._tokens.reshape(-1)
        self._starts = np.zeros(rows, np.int64)
        """Offset of each row's output in ``_flat``, less its prompt length: add a ``seq_len`` to find a sample."""
        self._prompt_lens = np.zeros(rows, np.int64)
        self._epoch = -1
        self._epoch_starts = self._starts
        """``_starts`` of the rows of the batches of ``_epoch``."""

    def load(self, batch: ModelWorkerBatch) -> None:
        """Take in the scripts of the requests that start in a batch."""
        for row, request_id, *_ in batch.new_requests:
            prompt_len, tokens = self._script(request_id)
            # One more than the script: an overlapped step after the stop samples once more, and is dropped.
            if len(tokens) + 1 > self._tokens.shape[1]:
                grown = np.zeros((len(self._tokens), 2 * len(tokens)), np.int32)
                grown[:, : self._tokens.shape[1]] = self._tokens
                self._tokens, self._flat = grown, grown.reshape(-1)
                self._starts = np.arange(len(self._starts)) * grown.shape[1] - self._prompt_lens
            self._tokens[row, : len(tokens)] = tokens
            self._prompt_lens[row] = prompt_len
            self._starts[row] = row * self._tokens.shape[1] - prompt_len
            self._epoch = -1

    def sample(self, batch: ModelWorkerBatch, steps: int = 1) -> StepOutput:
        """Output number ``seq_len - prompt_len`` of each row, int32[n]; of a decode batch and those that follow it while the
        same requests decode, ``steps`` in all, int32[steps * n], step after step. Past a request's end it is anything."""
        if batch.epoch != self._epoch:
            self._epoch, self._epoch_starts = batch.epoch, self._starts[batch.rows]
        at = self._epoch_starts + batch.seq_lens
        if steps > 1:
            at = (at + step_numbers(steps)).ravel()
        if batch.unsampled is not None:
            at[batch.unsampled] = 0  # inside the prompt: there is no output to take
        return StepOutput(self._flat[at])
