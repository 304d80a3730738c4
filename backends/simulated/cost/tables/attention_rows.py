"""Attention over cached keys and values out of published tables: the grids of prompts and of decodes of a shape.

A shape that was not measured is made of others: attention works on a request's KV head with the query heads on it, so that
requests of 32 KV heads are four times as many of 8; between two numbers of query heads on as many KV heads, and between two
sizes of a head, times lie on a straight line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts, Seen
from backends.simulated.cost.models.operator_tables import Grid, NotMeasured, grid_from_points
from backends.simulated.cost.tables.table_kinds import DTYPES, MILLISECOND, Columns, Tables, rows_where, shortest

FLAT_WINDOWS = 2
"""Windows of context from which the time of a decode with a window no longer grows: kernels read whole blocks."""


@dataclass(frozen=True)
class Shape:
    """Heads of attention on a GPU, and the window that a kernel is told; 0: none."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0

    def __str__(self) -> str:
        seen = f" in a window of {self.window}" if self.window else ""
        return f"{self.heads} heads on {self.kv_heads} of KV of {self.head_dim}{seen}"


@dataclass(frozen=True)
class Points:
    """Measured times of a shape."""

    where: np.ndarray
    """(requests, tokens of each), float[n, 2]."""
    seconds: np.ndarray
    how: str = ""
    """Made of what, where the shape itself was not measured."""


def prompts_of(tables: Tables, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[MeasuredPrompts, str]:
    """Attention of prompts, and what it was made of. Raises :class:`NotMeasured`."""
    points, longest = _seen_points(tables, "context_attention", shape, seen, kv_dtype)
    grid = grid_from_points(points.where, points.seconds, (0, 1))
    return MeasuredPrompts(
        grid, seen, pair_seconds(grid, seen if longest == np.inf else Seen()), 0.0, longest
    ), points.how


def decodes_of(tables: Tables, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[MeasuredDecodes, str]:
    """Attention of decodes, and what it was made of. Raises :class:`NotMeasured`."""
    points, longest = _seen_points(tables, "generation_attention", shape, seen, kv_dtype)
    grid = grid_from_points(points.where, points.seconds, (1, 0))
    if seen.window is None:
        return MeasuredDecodes(grid), points.how
    measured = longest == np.inf
    return MeasuredDecodes(grid, seen, FLAT_WINDOWS * seen.window if measured else longest, not measured), points.how


def pair_seconds(grid: Grid, seen: Seen) -> float:
    """Seconds for a pair of query and key more, between the two longest prompts that were measured."""
    if len(grid.axes[1]) < 2:
        raise NotMeasured("fewer than two lengths of prompts")
    before, last = grid.axes[1][-2:]
    slope = (grid.at(1, last) - grid.at(1, before)) / (seen.pairs(last) - seen.pairs(before))
    return max(slope, 0.0)


def _seen_points(tables: Tables, kind: str, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[Points, float]:
    """Points of a shape, and up to how many tokens they are of tokens that see what is asked for."""
    if seen.window is None:
        return _points(tables, kind, shape, kv_dtype), np.inf
    if not seen.chunked:
        try:
            return _points(tables, kind, replace(shape, window=seen.window), kv_dtype), np.inf
        except NotMeasured:
            pass
    found = _points(tables, kind, shape, kv_dtype)
    how = "by attention to all tokens, at those that are seen"
    return replace(found, how=f"{how}, {found.how}" if found.how else how), float(seen.window)


def _points(tables: Tables, kind: str, shape: Shape, kv_dtype: str) -> Points:
    """Points of a shape, or of what it is made of. Raises :class:`NotMeasured`."""
    columns = tables.table(kind)
    of = _computed(columns, rows_where(columns, kv_cache_dtype=kv_dtype, window_size=shape.window), kv_dtype)
    sizes = columns["head_dim"]
    if (of & (sizes == shape.head_dim)).any():
        return _of_heads(columns, of & (sizes == shape.head_dim), kind, shape)
    have = np.unique(sizes[of])
    place = int(np.searchsorted(have, shape.head_dim))
    if not 0 < place < len(have):
        raise NotMeasured(f"{tables}: {kind}: {shape}: no heads of this size")
    low, high = (
        _of_heads(columns, of & (sizes == size), kind, replace(shape, head_dim=int(size)))
        for size in have[place - 1 : place + 1]
    )
    part = (shape.head_dim - have[place - 1]) / (have[place] - have[place - 1])
    return _between(low, high, part, f"between heads of {have[place - 1]:g} and {have[place]:g}")


def _computed(columns: Columns, of: np.ndarray, kv_dtype: str) -> np.ndarray:
    """Of these rows those computed in 16 bits; in 8 where KV is in 8 and there are no others."""
    if "attn_dtype" not in columns:
        return of
    wide: np.ndarray = of & (np.asarray(columns["attn_dtype"]) == DTYPES["bf16"])
    return of if kv_dtype == DTYPES["fp8"] and not wide.any() else wide


def _of_heads(columns: Columns, of: np.ndarray, kind: str, shape: Shape) -> Points:
    """Points of a shape with heads of a size that was measured; ``of`` are its rows."""
    heads, kv_heads = columns["num_heads"], columns["num_key_value_heads"]
    exact = of & (heads == shape.heads) & (kv_heads == shape.kv_heads)
    if exact.any():
        return _points_at(columns, exact, kind)
    have = np.unique(heads[of & (kv_heads == shape.kv_heads)])
    place = int(np.searchsorted(have, shape.heads))
    if 0 < place < len(have):
        fewer, more = have[place - 1 : place + 1]
        low, high = (_points_at(columns, of & (heads == n) & (kv_heads == shape.kv_heads), kind) for n in (fewer, more))
        part = (shape.heads - fewer) / (more - fewer)
        return _between(low, high, part, f"{shape.heads} heads between {fewer:g} and {more:g}")
    alike = of & (heads * shape.kv_heads == kv_heads * shape.heads)
    if not alike.any():
        raise NotMeasured(f"{kind}: {shape}: no such heads, nor others about them")
    # The largest that are no more, or the smallest.
    counts = np.unique(kv_heads[alike])
    fewer = counts[max(int(np.searchsorted(counts, shape.kv_heads)) - 1, 0)]
    found = _points_at(columns, alike & (kv_heads == fewer), kind)
    where = found.where * [fewer / shape.kv_heads, 1.0]
    return replace(found, where=where, how=f"as more requests of {fewer:g} KV heads")


def _points_at(columns: Columns, of: np.ndarray, kind: str) -> Points:
    """The points of these rows."""
    tokens = columns["isl"][of] if kind == "context_attention" else columns["step"][of] + 1
    where = np.stack((columns["batch_size"][of], tokens), axis=1)
    return Points(*shortest(where, columns["latency"][of] * MILLISECOND))


def _between(low: Points, high: Points, part: float, how: str) -> Points:
    """Points that both have, ``part`` of the way from one to the other."""
    above = {tuple(where): seconds for where, seconds in zip(high.where, high.seconds, strict=True)}
    of = [i for i, where in enumerate(low.where) if tuple(where) in above]
    if not of:
        raise NotMeasured(f"{how}: measured at different points")
    upper = np.array([above[tuple(low.where[i])] for i in of])
    made = ", ".join(dict.fromkeys(each for each in (how, low.how, high.how) if each))
    return Points(low.where[of], low.seconds[of] + part * (upper - low.seconds[of]), made)
