"""CSV files of a request a row: when it arrived, and how many tokens its prompt and its output have."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from traces.files.source import Source
from traces.files.values import count, length
from traces.formats.base import Format, Head, Reading
from traces.requests.trace_request import TraceRequest

Columns = tuple[str, str, str]
"""The names of arrival, input length and output length."""


def csv_format(name: str, about: str, columns: Columns, *, failed_without_output: bool = False, **more: Any) -> Format:
    """The format of such a file.

    With ``failed_without_output`` a row of 0 output tokens is a request that failed where it was logged: it is skipped
    and counted. ``more`` are fields of Format.
    """
    return Format(
        name=name,
        about=about,
        sniff=partial(_sniff, columns),
        read=partial(_read, columns, failed_without_output),
        closed_loop=False,
        ids_from_file=False,
        needs=columns,
        time_unit="s",
        **more,
    )


def _sniff(columns: Columns, head: Head) -> bool:
    return set(columns) <= set(head.columns)


def _read(columns: Columns, failed_without_output: bool, reading: Reading) -> Iterator[TraceRequest]:
    arrival, prompt, output = columns
    times = reading.times(arrival)

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest | None:
        arrived, input_length, output_length = cells
        if failed_without_output and count(source, line, output, output_length) == 0:
            reading.skip("failed request", f"0 {output.lower()}")
            return None
        return TraceRequest(
            request_id=f"r{line}",
            arrival_s=times.read(source, line, arrived),
            input_length=length(source, line, prompt, input_length),
            output_length=length(source, line, output, output_length),
            line=line,
        )

    return reading.csv(columns, make)
