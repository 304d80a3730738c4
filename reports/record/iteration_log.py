"""Collecting the rows of iterations.csv while a run goes on, at a few hundred nanoseconds a row."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np

from reports.record.schema import ITERATION_COLUMNS, Kind

_OWN = ("launch_s", "start_s", "end_s", "kv_used_tokens")
"""Columns of which every row of a stretch has a value of its own; the others follow from the row before the stretch."""
_DTYPES = {Kind.INT: np.int64, Kind.MODE: np.int8, Kind.TIME: np.float64, Kind.NUMBER: np.float64}
_LETTERS = {name: "q" if kind in (Kind.INT, Kind.MODE) else "d" for name, kind in ITERATION_COLUMNS.items()}
_ROW = struct.Struct("=" + "".join(_LETTERS.values()))
_ROW_DTYPE = np.dtype([(name, "=i8" if letter == "q" else "=f8") for name, letter in _LETTERS.items()])


class IterationLog:
    """An append-only table of iterations.

    A row is packed into a growing buffer. Of a stretch of rows that go on like the one before, what each has of its own goes
    into four arrays. No Python object outlives a call, so a million rows cost 32 to 144 MB and nothing for the garbage
    collector. Whole numbers stay exact.
    """

    __slots__ = ("_after", "_end_s", "_kv_used_tokens", "_launch_s", "_lengths", "_pack", "_rows", "_start_s")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._pack = _ROW.pack
        self._after, self._lengths = array("q"), array("q")
        """Of each stretch, the packed row that it goes on from, and its number of rows."""
        self._launch_s, self._start_s, self._end_s = array("d"), array("d"), array("d")
        self._kv_used_tokens = array("q")

    def append(self, row: Sequence[float]) -> None:
        """Add one row, its values in the order of iterations.csv; `mode` is a code (`schema.PREFILL`, `DECODE`, `MIXED`).

        Raises `struct.error` for a value too few or too many, or a float where a count belongs: a row must not be rounded
        silently.
        """
        self._rows += self._pack(*row)

    def go_on(
        self,
        launch_s: Sequence[float],
        start_s: Sequence[float],
        end_s: Sequence[float],
        kv_used_tokens: Sequence[int],
    ) -> None:
        """Add the rows of the steps after the last row's, in which the same requests decode: `iteration` counts up,
        `context_tokens` grows by `decode_tokens`, and these columns have values of their own."""
        self._after.append(len(self._rows) // _ROW.size - 1)
        self._lengths.append(len(launch_s))
        self._launch_s.extend(launch_s)
        self._start_s.extend(start_s)
        self._end_s.extend(end_s)
        self._kv_used_tokens.extend(kv_used_tokens)

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size + len(self._end_s)

    def columns(self) -> dict[str, np.ndarray]:
        """Copies of all columns so far: int64 for counts, int8 for `mode`, float64 for times."""
        rows = np.frombuffer(self._rows, _ROW_DTYPE)
        lengths = np.ones(len(rows), np.int64)
        """Of each packed row and the stretch that goes on from it."""
        lengths[self._after] += self._lengths
        step = np.arange(len(self)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        """Steps from the packed row to each one."""
        columns = {}
        for name, kind in ITERATION_COLUMNS.items():
            columns[name] = np.repeat(rows[name].astype(_DTYPES[kind]), lengths)
            if name in _OWN:
                columns[name][step > 0] = getattr(self, "_" + name)
        columns["iteration"] += step
        columns["context_tokens"] += columns["decode_tokens"] * step
        return columns
