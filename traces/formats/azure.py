"""Azure LLM inference traces of 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens."""

from __future__ import annotations

from collections.abc import Iterator

from traces.dates import Times
from traces.fields import length
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    times = Times("TIMESTAMP")
    first_s: float | None = None

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest:
        nonlocal first_s
        stamp, context, generated = cells
        arrival_s = times.read(source, line, stamp)
        request = TraceRequest(
            request_id=f"r{line}",
            arrival_s=arrival_s,
            input_length=length(source, line, "ContextTokens", context),
            output_length=length(source, line, "GeneratedTokens", generated),
            line=line,
        )
        if times.dates:
            reading.dates = True
            first_s = arrival_s if first_s is None else first_s
            request.arrival_s = round(arrival_s - first_s, 7)  # The file's own resolution; more is float noise.
        return request

    return reading.csv(_COLUMNS, make)


FORMAT = Format(
    name="azure",
    about="Azure LLM inference trace, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_COLUMNS,
    time_unit="s",
    time_unit_is_sure=False,
    logged=True,
)
