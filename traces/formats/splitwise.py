"""splitwise-sim's traces: request_id, ..., arrival_timestamp (s), batch_size, prompt_size, token_size."""

from __future__ import annotations

from collections.abc import Iterator

from traces.dates import Times
from traces.fields import length
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest

_COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """A row is one request: the simulator that the format belongs to reads `batch_size` and never uses it."""
    times = Times("arrival_timestamp")

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest:
        arrived, prompt, tokens = cells
        request = TraceRequest(
            request_id=f"r{line}",
            arrival_s=times.read(source, line, arrived),
            input_length=length(source, line, "prompt_size", prompt),
            output_length=length(source, line, "token_size", tokens),
            line=line,
        )
        reading.dates = bool(times.dates)
        return request

    return reading.csv(_COLUMNS, make)


FORMAT = Format(
    name="splitwise",
    about="splitwise-sim, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_COLUMNS,
    time_unit="s",
)
