"""Mooncake: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks, shared by the whole file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from traces.content import Blocks, Synthetic
from traces.fields import MISSING, id_array, length, parse_json, seconds
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest

BLOCK_TOKENS = 512
TICK_S = 3.0


def _sniff(head: Head) -> bool:
    return head.has("timestamp", "input_length", "output_length", "hash_ids")


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """A tick's requests are held back until the next tick shows how long it lasted."""
    tick_s, tick = 0.0, list[TraceRequest]()
    for request in _records(reading):
        stamp_s = request.arrival_s or 0.0
        if tick and stamp_s != tick_s:
            yield from _spread(tick, tick_s, stamp_s)
            tick = []
        tick_s = stamp_s
        tick.append(request)
    yield from _spread(tick, tick_s, tick_s + TICK_S)


def _spread(tick: list[TraceRequest], start_s: float, next_s: float) -> list[TraceRequest]:
    """Move a tick's requests to even distances; times that go back are left for the caller to refuse."""
    step_s = max(0.0, min(next_s - start_s, TICK_S)) / max(1, len(tick))
    for place, request in enumerate(tick):
        request.arrival_s = round(start_s + place * step_s, 6)
    return tick


def _records(reading: Reading) -> Iterator[TraceRequest]:
    source = reading.source
    for line, text in source.lines():
        record = parse_json(source, line, text)
        request_id = f"r{line}"
        ids = id_array(source, line, "hash_ids", record.get("hash_ids", MISSING), np.int64)
        yield TraceRequest(
            request_id=request_id,
            arrival_s=seconds(source, line, "timestamp", record.get("timestamp", MISSING)) / 1e3,
            input_length=length(source, line, "input_length", record.get("input_length", MISSING)),
            output_length=length(source, line, "output_length", record.get("output_length", MISSING)),
            content=Synthetic(spans=((0, request_id),), blocks=Blocks(ids, BLOCK_TOKENS)),
            line=line,
        )


FORMAT = Format(
    name="mooncake",
    about="Mooncake, JSON lines with hash ids of 512-token blocks",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    notes=("timestamps come in ticks of 3 s: each tick's requests are spread evenly over the tick",),
)
