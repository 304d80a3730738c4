"""Collecting the rows of iterations.csv while a run goes on, at a few hundred nanoseconds a row."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from reports.record.schema import DECODE, ITERATION_COLUMNS, Kind

_OWN = ("launch_s", "start_s", "end_s", "kv_used_tokens")
"""Columns of which every row of a stretch has a value of its own; of the others the stretch has one."""
_SHARED = [name for name in ITERATION_COLUMNS if name not in _OWN]
_DTYPES = {Kind.INT: np.int64, Kind.MODE: np.int8, Kind.TIME: np.float64, Kind.NUMBER: np.float64}


def _packed(*counts: str, columns: Iterable[str]) -> tuple[struct.Struct, np.dtype]:
    """Whole numbers of these names and then columns, packed, and how numpy reads that."""
    letters = {name: "q" if ITERATION_COLUMNS[name] in (Kind.INT, Kind.MODE) else "d" for name in columns}
    letters = dict.fromkeys(counts, "q") | letters
    kinds = [(name, "=i8" if letter == "q" else "=f8") for name, letter in letters.items()]
    return struct.Struct("=" + "".join(letters.values())), np.dtype(kinds)


_ROW, _ROW_DTYPE = _packed(columns=ITERATION_COLUMNS)
_STRETCH, _STRETCH_DTYPE = _packed("place", "rows", "more_context", columns=_SHARED)


class IterationLog:
    """An append-only table of iterations.

    A row is packed into a growing buffer. Of a stretch of rows, what they have in common is packed once, the rest goes into
    four arrays. No Python object outlives a call, so a million rows cost 32 to 144 MB and nothing for the garbage
    collector. Whole numbers stay exact.
    """

    __slots__ = ("_end_s", "_kv_used_tokens", "_launch_s", "_pack", "_rows", "_start_s", "_stretches")

    def __init__(self) -> None:
        self._rows, self._stretches = bytearray(), bytearray()
        self._pack = _ROW.pack
        self._launch_s, self._start_s, self._end_s = array("d"), array("d"), array("d")
        self._kv_used_tokens = array("q")

    def append(self, row: Sequence[float]) -> None:
        """Add one row, its values in the order of iterations.csv; `mode` is a code (`schema.PREFILL`, `DECODE`, `MIXED`).

        Raises `struct.error` for a value too few or too many, or a float where a count belongs: a row must not be rounded
        silently.
        """
        self._rows += self._pack(*row)

    def append_decodes(
        self,
        iteration: int,
        instance: int,
        requests: int,
        context_tokens: int,
        waiting: int,
        running: int,
        cpu_s: tuple[float, ...],
        launch_s: Sequence[float],
        start_s: Sequence[float],
        end_s: Sequence[float],
        kv_used_tokens: Sequence[int],
    ) -> None:
        """Add the rows of consecutive steps in which the same requests decode on one stage, the first as given:
        `iteration` counts up and `context_tokens` grows by a token for each request. `cpu_s` are the four CPU phases."""
        self._stretches += _STRETCH.pack(
            len(self._rows) // _ROW.size,
            len(launch_s),
            requests,
            iteration,
            instance,
            0,
            DECODE,
            requests,
            0,
            requests,
            context_tokens,
            waiting,
            running,
            *cpu_s,
        )
        self._launch_s.extend(launch_s)
        self._start_s.extend(start_s)
        self._end_s.extend(end_s)
        self._kv_used_tokens.extend(kv_used_tokens)

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size + len(self._end_s)

    def columns(self) -> dict[str, np.ndarray]:
        """Copies of all columns so far: int64 for counts, int8 for `mode`, float64 for times."""
        rows = np.frombuffer(self._rows, _ROW_DTYPE)
        stretches = np.frombuffer(self._stretches, _STRETCH_DTYPE)
        lengths = stretches["rows"]
        ends = np.cumsum(lengths)
        step = np.arange(len(self._end_s)) - np.repeat(ends - lengths, lengths)
        """Place of each row in its stretch."""
        place = step + np.repeat(stretches["place"] + ends - lengths, lengths)
        alone = np.ones(len(self), bool)
        alone[place] = False
        columns = {}
        for name, kind in ITERATION_COLUMNS.items():
            column = columns[name] = np.empty(len(self), _DTYPES[kind])
            column[alone] = rows[name]
            if name in _OWN:
                column[place] = getattr(self, "_" + name)
            else:
                column[place] = np.repeat(stretches[name], lengths)
        columns["iteration"][place] += step
        columns["context_tokens"][place] += np.repeat(stretches["more_context"], lengths) * step
        return columns
