"""Content for a server without a model: pseudo-random tokens, a function of the prompt, the seed and the position.

The same prompt and seed get the same tokens in whatever batch, order or process, so a client can tell whether it was given
somebody else's answer. Temperature, penalties and the like have no distribution to act on and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from ground.errors import InputError
from workbench.scheduler.batch import ModelWorkerBatch, NewRequest, StepOutput

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
NEVER = np.iinfo(np.int64).max
_NOTHING: tuple[int, frozenset[int], int] = (0, frozenset(), 0)


def content_key(prompt: np.ndarray, seed: int | None) -> int:
    """64 bits that stand for a prompt and a seed."""
    digest = blake2b(np.ascontiguousarray(prompt, np.int32).tobytes(), digest_size=8, salt=b"workbench")
    digest.update(b"" if seed is None else str(seed).encode())
    return int.from_bytes(digest.digest(), "little")


def synthetic_output(key: int, start: int, stop: int, vocabulary: np.ndarray) -> np.ndarray:
    """int32[stop - start]: output tokens at these positions, drawn from ``vocabulary`` int32[v]."""
    return _draw(np.full(stop - start, key, np.uint64), np.arange(start, stop), vocabulary)


def _draw(keys: np.ndarray, positions: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    state = _states(keys, positions)
    return vocabulary[((state >> np.uint64(32)) * np.uint64(len(vocabulary)) >> np.uint64(32)).astype(np.int64)]


def _states(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64[n], the draw of each (key, position)."""
    state = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    # The splitmix64 finaliser.
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


class SyntheticSampler:
    """Samples for all rows of a batch at once.

    ``output_length(key)`` says after how many tokens a sequence ends itself with ``eos_token_id``, None for never; it
    applies where the request does not ignore the end of sequence, and not before its ``min_new_tokens``.
    """

    def __init__(
        self,
        vocabulary: Sequence[int] | np.ndarray,
        eos_token_id: int,
        rows: int,
        output_length: Callable[[int], int | None] = lambda key: None,
        closing: Sequence[int] | np.ndarray = (),
    ) -> None:
        """``closing``: tokens that end a part of an answer whose form is constrained, such as a quotation mark."""
        self._vocabulary = np.asarray([i for i in vocabulary if i != eos_token_id], np.int32)
        if not len(self._vocabulary):
            raise InputError("the tokenizer has no token to write with")
        self._closing = np.asarray(closing, np.int64)
        self._eos = eos_token_id
        self._output_length = output_length
        self._keys = np.zeros(rows, np.uint64)
        self._prompt_lens = np.zeros(rows, np.int64)
        self._eos_at = np.full(rows, NEVER, np.int64)
        self._avoid: dict[int, tuple[int, frozenset[int], int]] = {}
        """By row (tokens, banned ids, replacement): until so many tokens are out, a banned id becomes the replacement."""

    def load(self, batch: ModelWorkerBatch) -> None:
        """Take in the requests that start in a batch."""
        for request in batch.new_requests:
            row, params = request.row, request.params
            key = content_key(request.tokens[: request.input_len], params.seed)
            self._keys[row] = key
            self._prompt_lens[row] = request.input_len
            self._eos_at[row] = self._end(key, request)
            self._avoid.pop(row, None)
            if params.min_new_tokens and params.stop_token_ids and not params.ignore_eos:
                stops = frozenset(params.stop_token_ids)
                instead = next((int(i) for i in self._vocabulary if int(i) not in stops), int(self._vocabulary[0]))
                self._avoid[row] = params.min_new_tokens, stops, instead

    def sample(self, batch: ModelWorkerBatch) -> StepOutput:
        """int32[n]: output number ``seq_len - prompt_len`` of each row; rows still inside their prompt mean nothing."""
        rows = batch.rows
        positions = np.maximum(batch.seq_lens - self._prompt_lens[rows], 0)
        tokens = _draw(self._keys[rows], positions, self._vocabulary)
        ends = positions + 1 >= self._eos_at[rows]
        if ends.any():
            tokens[ends] = self._eos
        if self._avoid:
            for i, row in enumerate(rows.tolist()):
                least, stops, instead = self._avoid.get(row, _NOTHING)
                if positions[i] < least and int(tokens[i]) in stops:
                    tokens[i] = instead
        return StepOutput(tokens)

    def constrain(self, batch: ModelWorkerBatch, tokens: np.ndarray, masks: np.ndarray) -> None:
        """Put tokens that ``masks`` (``Backend.sample``) allow into int32[n] ``tokens`` of the masked rows, in place.

        An answer ends as soon as it may. Until then one token in four, by the draw, is one that brings the end nearer, if
        any such is allowed; the others are drawn like any answer's, from the whole vocabulary where that has none to offer.
        """
        assert batch.masked is not None
        rows = batch.rows[batch.masked]
        positions = np.maximum(batch.seq_lens[batch.masked] - self._prompt_lens[rows], 0)
        draws = _states(self._keys[rows], positions) >> np.uint64(32)
        for place, mask, draw in zip(batch.masked.tolist(), masks, draws.tolist(), strict=True):
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").view(bool)
            if allowed[self._eos]:
                tokens[place] = self._eos
                continue
            found = self._closing[allowed[self._closing]]
            if not len(found) or draw % 4:
                usual = self._vocabulary[allowed[self._vocabulary]]
                found = usual if len(usual) else allowed.nonzero()[0]
            if len(found):
                tokens[place] = found[(draw >> 2) % len(found)]

    def _end(self, key: int, request: NewRequest) -> int:
        if request.params.ignore_eos:
            return NEVER
        length = self._output_length(key)
        return NEVER if length is None else max(length, request.params.min_new_tokens + 1)
