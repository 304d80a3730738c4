"""The tokens of a request, made when they are asked for.

A request is one sequence of tokens, the prompt at positions [0, input_length) and the output right behind it. Its
content says what stands at each position without holding the tokens:

* `TokenIds`: the trace has the ids themselves.
* `Synthetic`: a hash of (seed, key, position). Blocks with equal ids in the same scope have equal keys, hence equal
  tokens: that is how a trace without text still has real shared prefixes. Positions no block covers take the key of the
  span they fall in, which belongs to one request or one session alone.

Synthetic ids lie in [3, vocab_size): 0, 1 and 2 are never synthesised, so that they can stand for padding, beginning and
end of sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from ground.errors import InputError
from traces.files.errors import TraceError

FIRST_SYNTHETIC_ID = 3
"""Smallest token id that is ever synthesised."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
PIECE_TOKENS = 16_384
"""Hashed at a time: the working arrays then stay in a core's L2 cache."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenIds:
    """Token ids given by the trace. `path` and the field names are for the error on an id outside the vocabulary."""

    prompt: np.ndarray
    """int32[input_length]."""
    output: np.ndarray | None
    """int32[output_length], or None where the trace has only the prompt."""
    path: str
    prompt_field: str = "prompt_token_ids"
    output_field: str = "output_token_ids"


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Ids of the leading blocks of a sequence: block b covers positions [b * size, (b + 1) * size)."""

    ids: np.ndarray
    """int64[blocks]."""
    size: int
    """Tokens in a block."""
    scope: str = ""
    """Equal ids mean equal tokens only within a scope; the empty one is shared by the whole trace."""


@dataclass(frozen=True, slots=True, eq=False)
class Synthetic:
    """Tokens made by hashing: blocks first, then spans."""

    spans: tuple[tuple[int, str], ...]
    """(first position, key), ascending, the first at 0; a span reaches to the next one's start."""
    blocks: Blocks | None = None
    inherited: bool = False
    """Follows from the session's earlier turns, so that writing the lengths alone says it again."""


Content = TokenIds | Synthetic


def unique(key: str) -> Synthetic:
    """Content that no request with another key shares."""
    return Synthetic(spans=((0, key),))


def continued(content: Synthetic, end: int, input_length: int, request_id: str) -> Synthetic:
    """A session's sequence, `end` tokens long so far, running on in the next turn; cut at `input_length` and going another
    way if that is shorter."""
    if input_length >= end:
        return content if content.inherited else Synthetic(content.spans, content.blocks, inherited=True)
    blocks = content.blocks
    if blocks is not None:
        blocks = Blocks(blocks.ids[: -(-input_length // blocks.size)], blocks.size, blocks.scope)
    spans = (*(span for span in content.spans if span[0] < input_length), (input_length, request_id))
    return Synthetic(spans, blocks, inherited=True)


@lru_cache(maxsize=4096)
def key_of(text: str) -> int:
    """A 64-bit key for a name, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def synthetic_tokens(content: Synthetic, start: int, stop: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Tokens at positions [start, stop) of a sequence: int32, the same whatever slice they are asked for in.

    Raises InputError when the vocabulary has no id left to synthesise.
    """
    _check_vocabulary(vocab_size)
    tokens = np.empty(stop - start, dtype=np.int32)
    at = start
    if content.blocks is not None:
        covered = min(stop, len(content.blocks.ids) * content.blocks.size)
        if at < covered:
            _fill_blocks(tokens[: covered - start], content.blocks, at, covered, vocab_size, seed)
            at = covered
    for number, (_, key) in enumerate(content.spans):
        end = min(stop, content.spans[number + 1][0]) if number + 1 < len(content.spans) else stop
        if at < end:
            base = _base(key, seed)
            for piece in range(at, end, PIECE_TOKENS):
                piece_end = min(piece + PIECE_TOKENS, end)
                state = _steps(piece, piece_end) + np.array(base, np.uint64)
                _to_ids(_mix(state), vocab_size, tokens[piece - start : piece_end - start])
            at = end
    return tokens


def tokens_of_keys(sequences: Sequence[tuple[str, int]], vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    """The first tokens, int32, of sequences that are one span each, given by key and length: those of
    :func:`synthetic_tokens`, which also says what is raised."""
    if not sequences:
        return []
    _check_vocabulary(vocab_size)
    lengths = [length for _, length in sequences]
    state = np.concatenate([_steps(0, length) for length in lengths])
    state += np.repeat(np.array([_base(key, seed) for key, _ in sequences], np.uint64), lengths)
    tokens = np.empty(len(state), np.int32)
    _to_ids(_mix(state), vocab_size, tokens)
    return [tokens[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _check_vocabulary(vocab_size: int) -> None:
    if vocab_size <= FIRST_SYNTHETIC_ID:
        raise InputError(f"synthetic tokens need a vocabulary of more than {FIRST_SYNTHETIC_ID} ids, not {vocab_size}")


def _base(key: str, seed: int) -> int:
    return _mix_one(key_of("span:" + key) + seed * _GOLDEN)


def _fill_blocks(tokens: np.ndarray, blocks: Blocks, start: int, stop: int, vocab_size: int, seed: int) -> None:
    """Write the tokens of positions [start, stop), all of them inside `blocks`."""
    size = blocks.size
    scope = np.uint64(_mix_one(key_of("scope:" + blocks.scope) + seed * _GOLDEN))
    first, last = start // size, -(-stop // size)
    ids = blocks.ids[first:last].astype(np.uint64)  # Negative ids wrap: still one key an id.
    ids *= np.uint64(_GOLDEN)
    ids += scope
    bases = _mix(ids)
    steps = np.arange(1, size + 1, dtype=np.uint64)
    steps *= np.uint64(_GOLDEN)
    rows = max(1, PIECE_TOKENS // size)
    for row in range(0, len(bases), rows):
        state = (bases[row : row + rows, None] + steps[None, :]).reshape(-1)
        at = (first + row) * size
        low, high = max(start, at), min(stop, at + len(state))
        _to_ids(_mix(state[low - at : high - at]), vocab_size, tokens[low - start : high - start])


def explicit_tokens(ids: np.ndarray, vocab_size: int, path: str, line: int, field: str) -> np.ndarray:
    """The ids as they are.

    Raises TraceError when one is outside the vocabulary.
    """
    if len(ids) and int(ids.max()) >= vocab_size:
        raise TraceError(path, line, field, f"'{int(ids.max())}' is outside the model's vocabulary of {vocab_size}")
    return ids


# Constants as arrays without dimensions: with a short prompt, numpy takes longer to convert a number than to use it.
_30, _27, _31, _32, _FACTOR_1, _FACTOR_2 = (
    np.array(number, np.uint64) for number in (30, 27, 31, 32, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_FIRST_ID = np.array(FIRST_SYNTHETIC_ID, np.int32)
_STEPS = np.arange(1, 1 << 14, dtype=np.uint64) * np.uint64(_GOLDEN)


def _steps(start: int, stop: int) -> np.ndarray:
    """Positions [start, stop), counted from 1, times the golden ratio; kept for the positions that most prompts have."""
    if stop < len(_STEPS):
        return _STEPS[start:stop]
    return np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


def _mix(state: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, in place."""
    shifted = state >> _30
    state ^= shifted
    state *= _FACTOR_1
    np.right_shift(state, _27, out=shifted)
    state ^= shifted
    state *= _FACTOR_2
    np.right_shift(state, _31, out=shifted)
    state ^= shifted
    return state


def _mix_one(state: int) -> int:
    """The splitmix64 finaliser of one number."""
    state &= _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def _to_ids(state: np.ndarray, vocab_size: int, tokens: np.ndarray) -> None:
    """Map 64-bit hashes onto [3, vocab_size): a multiply and a shift cost a fifth of a modulo."""
    state >>= _32
    state *= np.array(vocab_size - FIRST_SYNTHETIC_ID, np.uint64)
    np.right_shift(state, _32, out=tokens, casting="unsafe")  # below the vocabulary size, so an int32
    tokens += _FIRST_ID
