"""BurstGPT: Timestamp, Session ID, Elapsed time, Model, Request tokens, Response tokens, Total tokens, Log Type."""

from __future__ import annotations

from collections.abc import Iterator

from traces.dates import Times
from traces.fields import count, length
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """The sessions of later releases only group rows: every row keeps the arrival it was logged with."""
    times = Times("Timestamp")
    failed = 0

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest | None:
        nonlocal failed
        stamp, prompt, response = cells
        output_length = count(source, line, "Response tokens", response)
        if output_length == 0:
            failed += 1
            return None
        request = TraceRequest(
            request_id=f"r{line}",
            arrival_s=times.read(source, line, stamp),
            input_length=length(source, line, "Request tokens", prompt),
            output_length=output_length,
            line=line,
        )
        reading.dates = bool(times.dates)
        return request

    yield from reading.csv(_COLUMNS, make)
    if failed:
        reading.note(f"{failed} failed requests (0 response tokens) were skipped")


FORMAT = Format(
    name="burstgpt",
    about="BurstGPT, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_COLUMNS,
    time_unit="s",
    logged=True,
)
