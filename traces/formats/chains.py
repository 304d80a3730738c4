"""Tokens of an agent session whose calls give the block ids of their prompts and say nothing of their outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Call:
    """A call's prompt."""

    ids: np.ndarray
    """int64 ids of the prompt's full blocks; a partial last block has none."""
    input_length: int
    output_length: int
    tail_id: int
    """An id no block has, for the partial block at the end."""


def sequence_ids(calls: list[Call], block_tokens: int) -> list[np.ndarray]:
    """Block ids of each call's prompt *and output*.

    A call is extended by the first later call that shares all its full blocks and is longer. Its partial last block and
    its output are then what that call's prompt has in these places, so that a cache which keeps outputs is hit as it was
    in life. Blocks past that prompt's end, and the output of a call nobody extends, are left without ids: they are unique.

    Shared prefixes are compared by hash, so the cost is linear in the blocks (and, over calls nobody extends, quadratic in
    the calls of one session, at a tenth of a microsecond each).
    """
    prefixes = [_prefix_hashes(call.ids) for call in calls]
    whole: list[np.ndarray] = [np.empty(0, np.int64)] * len(calls)
    for number in range(len(calls) - 1, -1, -1):
        call = calls[number]
        full = call.input_length // block_tokens
        if len(call.ids) < full:  # The trace leaves part of the prompt open; what follows it cannot be placed.
            whole[number] = call.ids
            continue
        later = _extended_by(number, full, calls, prefixes) if full else None
        if later is None:
            rest = np.array([call.tail_id], np.int64)
        else:
            end = min(call.input_length + call.output_length, calls[later].input_length)
            rest = whole[later][full : -(-end // block_tokens)]
        whole[number] = np.concatenate([call.ids[:full], rest])
    return whole


def _extended_by(number: int, full: int, calls: list[Call], prefixes: list[list[int]]) -> int | None:
    wanted = prefixes[number][full - 1]
    for later in range(number + 1, len(calls)):
        prefix = prefixes[later]
        if (
            len(prefix) >= full
            and prefix[full - 1] == wanted
            and calls[later].input_length > calls[number].input_length
        ):
            return later
    return None


def _prefix_hashes(ids: np.ndarray) -> list[int]:
    """Hash of each of the prefixes ids[:1], ids[:2], ..."""
    mixed = ids.astype(np.uint64)
    mixed += np.arange(1, len(ids) + 1, dtype=np.uint64) << np.uint64(40)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return np.cumsum(mixed, dtype=np.uint64).tolist()
