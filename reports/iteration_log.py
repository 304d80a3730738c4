"""Collecting the rows of iterations.csv while a run goes on, at a few hundred nanoseconds a row."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from reports.schema import ITERATION_COLUMNS, Kind

_IS_INT = [kind in (Kind.INT, Kind.MODE) for kind in ITERATION_COLUMNS.values()]
_ROW = struct.Struct("=" + "".join("q" if is_int else "d" for is_int in _IS_INT))
_ROW_DTYPE = np.dtype(
    [(name, "=i8" if is_int else "=f8") for name, is_int in zip(ITERATION_COLUMNS, _IS_INT, strict=True)]
)


class IterationLog:
    """An append-only table of iterations, 8 bytes a value.

    Rows are packed into one growing buffer: no Python object outlives `append`, so a million rows cost 144 MB and
    nothing for the garbage collector. Whole numbers stay exact.
    """

    __slots__ = ("_buffer", "_pack")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pack = _ROW.pack

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

        Raises `struct.error` for a float where a count belongs: a row must not be rounded silently.
        """
        # Spelled out rather than *values: half the cost, and a row with a value too few fails where it is made.
        self._buffer += self._pack(
            iteration,
            instance,
            stage,
            mode,
            launch_s,
            start_s,
            end_s,
            requests,
            prefill_tokens,
            decode_tokens,
            context_tokens,
            kv_used_tokens,
            waiting,
            running,
            receive_s,
            schedule_s,
            launch_host_s,
            process_s,
        )

    def append_like(self, first: tuple[float, ...], **columns: Sequence[float] | np.ndarray) -> None:
        """Add rows that are all as `first`, but for `columns`, each with a value for every row."""
        start = len(self._buffer)
        self._buffer += self._pack(*first) * len(next(iter(columns.values())))
        rows = np.frombuffer(self._buffer, _ROW_DTYPE, offset=start)
        for name, values in columns.items():
            rows[name] = values

    def __len__(self) -> int:
        return len(self._buffer) // _ROW.size

    def columns(self) -> dict[str, np.ndarray]:
        """Copies of all columns so far: int64 for counts, int8 for `mode`, float64 for times."""
        rows = np.frombuffer(self._buffer, dtype=_ROW_DTYPE)
        dtypes = {Kind.INT: np.int64, Kind.MODE: np.int8, Kind.TIME: np.float64, Kind.NUMBER: np.float64}
        return {name: rows[name].astype(dtypes[kind]) for name, kind in ITERATION_COLUMNS.items()}
