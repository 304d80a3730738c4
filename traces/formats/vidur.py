"""Vidur's processed traces: arrived_at, num_prefill_tokens, num_decode_tokens."""

from __future__ import annotations

from collections.abc import Iterator

from traces.dates import Times
from traces.fields import length
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest

_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    times = Times("arrived_at")

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest:
        arrived, prefill, decode = cells
        request = TraceRequest(
            request_id=f"r{line}",
            arrival_s=times.read(source, line, arrived),
            input_length=length(source, line, "num_prefill_tokens", prefill),
            output_length=length(source, line, "num_decode_tokens", decode),
            line=line,
        )
        reading.dates = bool(times.dates)
        return request

    return reading.csv(_COLUMNS, make)


FORMAT = Format(
    name="vidur",
    about="Vidur, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_COLUMNS,
    time_unit="s",
)
