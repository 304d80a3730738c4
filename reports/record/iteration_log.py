"""Collecting the rows of iterations.csv while a run goes on, at a few hundred nanoseconds a row."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np

from reports.record.schema import DECODE, ITERATION_COLUMNS, Kind

_OWN = ("launch_s", "start_s", "end_s", "kv_used_tokens")
"""Columns of which every row has a value of its own; of the others a stretch of rows has one."""
_SHARED = [name for name in ITERATION_COLUMNS if name not in _OWN]
_IS_INT = {name: kind in (Kind.INT, Kind.MODE) for name, kind in ITERATION_COLUMNS.items()}
_STRETCH = struct.Struct("=qq" + "".join("q" if _IS_INT[name] else "d" for name in _SHARED))
_STRETCH_DTYPE = np.dtype(
    [("rows", "=i8"), ("more_context", "=i8"), *((name, "=i8" if _IS_INT[name] else "=f8") for name in _SHARED)]
)
_DTYPES = {Kind.INT: np.int64, Kind.MODE: np.int8, Kind.TIME: np.float64, Kind.NUMBER: np.float64}


class IterationLog:
    """An append-only table of iterations.

    What a stretch of rows has in common is packed once into a growing buffer, the rest of a row into four arrays: no
    Python object outlives a call, so a million rows cost 32 to 160 MB and nothing for the garbage collector. Whole numbers
    stay exact.
    """

    __slots__ = ("_end_s", "_kv_used_tokens", "_launch_s", "_pack", "_start_s", "_stretches")

    def __init__(self) -> None:
        self._stretches = bytearray()
        self._pack = _STRETCH.pack
        self._launch_s, self._start_s, self._end_s = array("d"), array("d"), array("d")
        self._kv_used_tokens = array("q")

    def append(
        self,
        iteration: int,
        instance: int,
        stage: int,
        mode: int,
        launch_s: float,
        start_s: float,
        end_s: float,
        requests: int,
        prefill_tokens: int,
        decode_tokens: int,
        context_tokens: int,
        kv_used_tokens: int,
        waiting: int,
        running: int,
        receive_s: float,
        schedule_s: float,
        launch_host_s: float,
        process_s: float,
    ) -> None:
        """Add one row, in the order of iterations.csv; `mode` is a code (`schema.PREFILL`, `DECODE`, `MIXED`).

        Raises `struct.error` or TypeError for a float where a count belongs: a row must not be rounded silently.
        """
        # Spelled out rather than *values: half the cost, and a row with a value too few fails where it is made.
        stretch = self._pack(
            1,
            0,
            iteration,
            instance,
            stage,
            mode,
            requests,
            prefill_tokens,
            decode_tokens,
            context_tokens,
            waiting,
            running,
            receive_s,
            schedule_s,
            launch_host_s,
            process_s,
        )
        self._kv_used_tokens.append(kv_used_tokens)  # what is refused, is before anything has changed
        self._stretches += stretch
        self._launch_s.append(launch_s)
        self._start_s.append(start_s)
        self._end_s.append(end_s)

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
        self._stretches += self._pack(
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
        return len(self._end_s)

    def columns(self) -> dict[str, np.ndarray]:
        """Copies of all columns so far: int64 for counts, int8 for `mode`, float64 for times."""
        stretches = np.frombuffer(self._stretches, _STRETCH_DTYPE)
        rows = stretches["rows"]
        columns = {}
        for name, kind in ITERATION_COLUMNS.items():
            dtype = _DTYPES[kind]
            if name in _OWN:
                columns[name] = np.array(getattr(self, "_" + name), dtype)
            else:
                columns[name] = np.repeat(stretches[name].astype(dtype), rows)
        place = np.arange(len(self)) - np.repeat(np.cumsum(rows) - rows, rows)
        columns["iteration"] += place
        columns["context_tokens"] += np.repeat(stretches["more_context"], rows) * place
        return columns
