"""Stop conditions: the samples that end a request.

Nearly always every request of a batch ends at the same id, the model's end of sequence, and most batches hold none: then one
look at the samples' bytes tells. Batches that differ have a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import byteorder

import numpy as np

from workbench.scheduler.request import Req

StopIds = int | np.ndarray | None
"""The one id that ends each request of several; int32[n] or int32[n, k], padded with -1, where they differ or have more;
None where only length ends them."""


def stop_ids_of(reqs: Sequence[Req]) -> StopIds:
    """The ids that end each request."""
    first = reqs[0].stop_ids
    width = max(len(req.stop_ids) for req in reqs)
    if width == 0:
        return None
    if width == 1:
        if all(req.stop_ids == first for req in reqs):
            return first[0]
        return np.array([req.stop_ids[0] if req.stop_ids else -1 for req in reqs], np.int32)
    table = np.full((len(reqs), width), -1, np.int32)
    for i, req in enumerate(reqs):
        table[i, : len(req.stop_ids)] = req.stop_ids
    return table


def stacked(upper: StopIds, lower: StopIds, upper_count: int, lower_count: int) -> StopIds:
    """Those of ``upper_count`` requests and then of ``lower_count`` others."""
    if upper_count == 0 or lower_count == 0:
        return lower if upper_count == 0 else upper
    if not isinstance(upper, np.ndarray) and not isinstance(lower, np.ndarray) and upper == lower:
        return upper
    parts = [_table(upper, upper_count), _table(lower, lower_count)]
    width = max(part.shape[1] for part in parts)
    table = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts])
    return table[:, 0].copy() if width == 1 else table


def chosen(stop_ids: StopIds, at: slice | Sequence[int] | np.ndarray) -> StopIds:
    """Those of some of the requests."""
    return stop_ids[at] if isinstance(stop_ids, np.ndarray) else stop_ids


def stopped(stop_ids: StopIds, tokens: np.ndarray) -> Sequence[int]:
    """Places in ``tokens`` of the samples that end a request: int[n], or int[k * n] of the same n requests, step after
    step."""
    if stop_ids is None:
        return ()
    if isinstance(stop_ids, int):
        return _places(stop_ids, tokens)
    steps = tokens if len(tokens) == len(stop_ids) else tokens.reshape(-1, len(stop_ids))
    same = steps == stop_ids if stop_ids.ndim == 1 else (steps[..., None] == stop_ids).any(-1)
    hits: list[int] = same.ravel().nonzero()[0].tolist()
    return hits


def _places(stop_id: int, tokens: np.ndarray) -> list[int]:
    """Return where the id is."""
    places: list[int] = []
    size, data = tokens.itemsize, tokens.tobytes()
    pattern = stop_id.to_bytes(size, byteorder, signed=True)
    at = data.find(pattern)
    while at >= 0:
        if at % size == 0:  # between two tokens the bytes may look like it, too
            places.append(at // size)
        at = data.find(pattern, at + 1)
    return places


def _table(stop_ids: StopIds, count: int) -> np.ndarray:
    """int32[count, k]"""
    if isinstance(stop_ids, np.ndarray):
        return stop_ids if stop_ids.ndim == 2 else stop_ids[:, None]
    return np.full((count, 1), -1 if stop_ids is None else stop_ids, np.int32)
