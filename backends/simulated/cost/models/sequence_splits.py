"""The point at which decode attention stops cutting long sequences into pieces.

FlashAttention-2 lets several blocks of a GPU share one sequence while there are few sequences, and gives every sequence and
KV head one block once these blocks fill the GPU: from 0.8 times two blocks a multiprocessor on (``num_splits_heuristic`` in
its ``flash_api.cpp``). Before that point lengths hardly matter beyond their sum; after it the longest sequence ends last,
and that costs the most just after the point, where there is the least other work beside it. Profiles measure at powers of
two, so the point lies between two measurements, and a straight line between these would hide it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from backends.simulated.cost.models.operator_tables import AttentionTable, Grid

FULL = 0.8 * 2
"""Blocks for each multiprocessor from which on no sequence is cut."""
MOST_BEFORE, LEAST_AFTER = 0.03, 0.05
"""Shares by which very uneven lengths take longer: less than this where sequences are cut, more where they are not."""


def first_uncut(multiprocessors: int, kv_heads: float, capture_sizes: Sequence[int] = ()) -> int:
    """Fewest decodes whose sequences are not cut. ``kv_heads`` are those of one GPU. A step that replays a captured graph
    runs the kernel that was chosen for the graph's size."""
    fewest = ceil(FULL * multiprocessors / kv_heads)
    place = bisect_left(capture_sizes, fewest)
    if place == len(capture_sizes):
        return fewest
    return capture_sizes[place - 1] + 1 if place else 1


def cut_at(table: AttentionTable, first: int) -> AttentionTable:
    """The table with a step at ``first`` decodes, the fewest whose sequences are not cut; the table itself where its
    measurements do not show the step between the same two points."""
    uneven = table.uneven_decode
    if uneven is None:
        return table
    counts = uneven.axes[0]
    after = bisect_left(counts, first)
    if not 0 < after < len(counts) or counts[after] == first:
        return table
    before = after - 1
    if counts[before] not in table.decode.axes[0] or counts[after] not in table.decode.axes[0]:
        return table
    # At their most uneven, over all contexts: the shortest take so little time that their shares are mostly noise.
    shares = np.median(uneven.values[:, -1], axis=-1)
    if shares[before] > MOST_BEFORE or shares[after] < LEAST_AFTER:
        return table
    decode = _with_rows(table.decode, first, _equal_rows(table.decode, counts[before], counts[after], first))
    # The last blocks run beside ever fewer others: what that adds is a time, whatever has run before.
    measured = np.array([[table.decode.at(counts[after], mean)] for mean in uneven.axes[2]]).T
    fewer = np.array([[decode.at(first, mean)] for mean in uneven.axes[2]]).T
    rows = {first - 1: uneven.values[before], first: uneven.values[after] * measured / fewer}
    return replace(table, decode=decode, uneven_decode=_with_rows(uneven, first, rows))


def _equal_rows(decode: Grid, before: float, after: float, first: int) -> dict[int, np.ndarray]:
    """Times at the last count that is cut and at the first that is not, each along the line through its own side."""
    counts, values = decode.axes[0], decode.values
    low, high = bisect_left(counts, before), bisect_left(counts, after)
    rows = {}
    for at, one, other in ((first - 1, low - 1, low), (first, high, high + 1)):
        if one >= 0 and other < len(counts):
            slope = (values[other] - values[one]) / (counts[other] - counts[one])
            rows[at] = values[one] + slope * (at - counts[one])
        else:
            part = (at - counts[low]) / (counts[high] - counts[low])
            rows[at] = values[low] + part * (values[high] - values[low])
    rows[first] = np.maximum(rows[first], values[low])
    return rows


def _with_rows(grid: Grid, first: int, rows: dict[int, np.ndarray]) -> Grid:
    """A grid with more points on its first axis; points it has stay."""
    counts, values = list(grid.axes[0]), list(grid.values)
    for count, row in rows.items():
        place = bisect_left(counts, count)
        if place == len(counts) or counts[place] != count:
            counts.insert(place, float(count))
            values.insert(place, row)
    return Grid([counts, *grid.axes[1:]], np.stack(values))
