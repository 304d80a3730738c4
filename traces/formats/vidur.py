"""Vidur's processed traces: arrived_at, num_prefill_tokens, num_decode_tokens."""

from __future__ import annotations

from collections.abc import Iterator

from traces.fields import length, seconds
from traces.formats.base import Format, Head, Reading
from traces.formats.table import rows
from traces.request import TraceRequest

_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    source = reading.source
    for line, (arrived, prefill, decode) in rows(source, *_COLUMNS):
        yield TraceRequest(
            request_id=f"r{line}",
            arrival_s=seconds(source, line, "arrived_at", arrived),
            input_length=length(source, line, "num_prefill_tokens", prefill),
            output_length=length(source, line, "num_decode_tokens", decode),
            line=line,
        )


FORMAT = Format(
    name="vidur",
    about="Vidur, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
)
