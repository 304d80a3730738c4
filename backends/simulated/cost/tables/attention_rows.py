"""Attention over cached keys and values out of published tables: the grids of prompts and of decodes of a shape.

A shape that was not measured is made of others: attention works on a request's KV head with the query heads on it, so that
requests of 32 KV heads are four times as many of 8; between two numbers of query heads on as many KV heads, and between two
sizes of a head, times lie on a straight line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backends.simulated.cost.models.filled_grid import Shape as Fitted
from backends.simulated.cost.models.filled_grid import Terms, beside, between
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts, Seen
from backends.simulated.cost.models.operator_tables import Grid, NotMeasured
from backends.simulated.cost.tables.table_kinds import DTYPES, MILLISECOND, Columns, Tables, rows_where, shortest

FLAT_WINDOWS = 2
"""Windows of context from which the time of a decode with a window no longer grows: kernels read whole blocks."""
PROMPT_PARTS = 3
"""Parts into which intervals between measured lengths of prompts are divided, for time is no straight line there."""


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
class Table:
    """Times of a shape."""

    requests: np.ndarray
    tokens: np.ndarray
    """Of each request."""
    seconds: np.ndarray
    """[requests, tokens]."""
    how: str = ""
    """Made of what, where the shape itself was not measured."""


@dataclass(frozen=True)
class _Rows:
    """Which rows of a table are read for a shape, and how."""

    kind: str
    columns: Columns
    of: np.ndarray
    terms: Terms
    """Of (requests, tokens of each, query heads)."""
    finer: int
    """Parts into which every interval of tokens is divided."""
    also: tuple[float, ...]
    """More numbers of tokens."""


def prompts_of(tables: Tables, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[MeasuredPrompts, str]:
    """Attention of prompts, and what it was made of. Raises :class:`NotMeasured`."""
    table, longest = _seen_table(tables, "context_attention", shape, seen, kv_dtype)
    grid = Grid((table.requests, table.tokens), table.seconds)
    pair_s = pair_seconds(grid, seen if longest == np.inf else Seen())
    return MeasuredPrompts(grid, seen, pair_s, 0.0, longest), table.how


def decodes_of(tables: Tables, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[MeasuredDecodes, str]:
    """Attention of decodes, and what it was made of. Raises :class:`NotMeasured`."""
    table, longest = _seen_table(tables, "generation_attention", shape, seen, kv_dtype)
    grid = Grid((table.requests, table.tokens), table.seconds)
    if seen.window is None:
        return MeasuredDecodes(grid), table.how
    measured = longest == np.inf
    return MeasuredDecodes(grid, seen, FLAT_WINDOWS * seen.window if measured else longest, not measured), table.how


def prompt_terms(seen: Seen) -> Terms:
    """Of (prompts, tokens of each, query heads): a launch, tokens, pairs of query and key, both of every head."""

    def terms(points: np.ndarray) -> np.ndarray:
        prompts, tokens, heads = points.T
        lengths, place = np.unique(tokens, return_inverse=True)
        pairs = np.array([seen.pairs(length) for length in lengths.tolist()])[place.reshape(-1)]
        return np.column_stack((np.ones(len(points)), prompts * tokens * heads, prompts * pairs * heads))

    return terms


def decode_terms(window: int | None = None) -> Terms:
    """Of (requests, context of each, query heads): a launch, requests, what they read, what their heads compute."""

    def terms(points: np.ndarray) -> np.ndarray:
        requests, context, heads = points.T
        seen = context if window is None else np.minimum(context, window)
        return np.column_stack((np.ones(len(points)), requests, requests * seen, requests * seen * heads))

    return terms


def pair_seconds(grid: Grid, seen: Seen) -> float:
    """Seconds for a pair of query and key more, between the longest prompts and half as long ones."""
    lengths = grid.axes[1]
    last = lengths[-1]
    before = next((length for length in reversed(lengths) if length <= last / 2), lengths[0])
    if before == last:
        raise NotMeasured("fewer than two lengths of prompts")
    slope = (grid.at(1, last) - grid.at(1, before)) / (seen.pairs(last) - seen.pairs(before))
    return max(slope, 0.0)


def _seen_table(tables: Tables, kind: str, shape: Shape, seen: Seen, kv_dtype: str) -> tuple[Table, float]:
    """Times of a shape, and up to how many tokens they are of tokens that see what is asked for."""
    if seen.window is None:
        return _table(tables, kind, shape, kv_dtype), np.inf
    if not seen.chunked:
        try:
            return _table(tables, kind, replace(shape, window=seen.window), kv_dtype), np.inf
        except NotMeasured:
            pass
    found = _table(tables, kind, shape, kv_dtype, float(seen.window))
    how = "by attention to all tokens, at those that are seen"
    return replace(found, how=f"{how}, {found.how}" if found.how else how), float(seen.window)


def _table(tables: Tables, kind: str, shape: Shape, kv_dtype: str, *also: float) -> Table:
    """Times of a shape, or of what it is made of. Raises :class:`NotMeasured`."""
    columns = tables.table(kind)
    of = _computed(columns, rows_where(columns, kv_cache_dtype=kv_dtype, window_size=shape.window), kv_dtype)
    prompts, window = kind == "context_attention", shape.window or None
    terms = prompt_terms(Seen(window)) if prompts else decode_terms(window)
    rows = _Rows(kind, columns, of, terms, PROMPT_PARTS if prompts else 1, also)
    sizes = columns["head_dim"]
    have = np.unique(sizes[of])
    if shape.head_dim in have:
        return _of_heads(replace(rows, of=of & (sizes == shape.head_dim)), shape)
    place = int(np.searchsorted(have, shape.head_dim))
    if not 0 < place < len(have):
        raise NotMeasured(f"{tables}: {kind}: {shape}: no heads of this size")
    low, high = (
        _of_heads(replace(rows, of=of & (sizes == size)), replace(shape, head_dim=int(size)))
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


def _of_heads(rows: _Rows, shape: Shape) -> Table:
    """Times of a shape with heads of a size that was measured."""
    heads, kv_heads = rows.columns["num_heads"], rows.columns["num_key_value_heads"]
    own = rows.of & (kv_heads == shape.kv_heads)
    have = np.unique(heads[own])
    about = beside(have, shape.heads)
    if shape.heads in have or (len(about) == 2 and have[0] < shape.heads < have[-1]):
        how = "" if shape.heads in have else f"{shape.heads} heads between {about[0]:g} and {about[1]:g}"
        return _made(rows, own & np.isin(heads, about), shape.heads, 1.0, how)
    alike = rows.of & (heads * shape.kv_heads == kv_heads * shape.heads)
    if not alike.any():
        raise NotMeasured(f"{rows.kind}: {shape}: no such heads, nor others about them")
    # The largest that are no more, or the smallest.
    counts = np.unique(kv_heads[alike])
    fewer = counts[max(int(np.searchsorted(counts, shape.kv_heads)) - 1, 0)]
    times = fewer / shape.kv_heads
    return _made(
        rows, alike & (kv_heads == fewer), shape.heads * times, times, f"as more requests of {fewer:g} KV heads"
    )


def _made(rows: _Rows, of: np.ndarray, heads: float, times: float, how: str) -> Table:
    """Times for so many heads out of these rows, in which ``times`` as many requests have the work of one."""
    columns = rows.columns
    tokens = columns["isl"] if rows.kind == "context_attention" else columns["step"] + 1
    where = np.stack((columns["batch_size"][of], tokens[of], columns["num_heads"][of]), axis=1)
    fitted = Fitted(*shortest(where, columns["latency"][of] * MILLISECOND), rows.terms)
    # At all counts of the whole table: what this shape lacks of them follows from what it has.
    every = [np.unique(columns["batch_size"][rows.of]), np.unique(tokens[rows.of])]
    longest = fitted.axes[1][-1]
    every[1] = every[1][every[1] <= longest]
    finer = [*between(every[1], rows.finer), *(value for value in rows.also if value < longest)]
    axes = [every[0], np.union1d(every[1], finer)]
    seconds = fitted.seconds([*axes, np.array([float(heads)])])[:, :, 0]
    return Table(axes[0] * times, axes[1], seconds, how)


def _between(low: Table, high: Table, part: float, how: str) -> Table:
    """``part`` of the way from one to the other, at all points of both."""
    requests = np.union1d(low.requests, high.requests)
    tokens = np.union1d(low.tokens, high.tokens)
    tokens = tokens[tokens <= min(low.tokens[-1], high.tokens[-1])]
    requests = requests[requests <= min(low.requests[-1], high.requests[-1])]
    below, above = (
        np.array([[grid.at(n, length) for length in tokens] for n in requests])
        for grid in (Grid((each.requests, each.tokens), each.seconds) for each in (low, high))
    )
    made = ", ".join(dict.fromkeys(each for each in (how, low.how, high.how) if each))
    return Table(requests, tokens, below + part * (above - below), made)
