"""Qwen-Bailian: chat_id, parent_chat_id, timestamp (s), input_length, output_length, type, turn, hash_ids (16 tokens)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from traces.files.source import Source
from traces.files.values import MISSING, id_array, length, text
from traces.formats.base import Format, Head, Reading
from traces.requests.content import Blocks, Synthetic
from traces.requests.trace_request import TraceRequest

BLOCK_TOKENS = 16


def _sniff(head: Head) -> bool:
    return head.has("chat_id", "hash_ids")


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """Turns keep the arrivals they were logged with, so they are no session here; what they share is in the hash ids.

    Offline requests were logged without: where the first row has no timestamp, none is read.
    """
    times = reading.times("timestamp")
    timed: bool | None = None

    def make(source: Source, line: int, record: dict[str, Any]) -> TraceRequest:
        nonlocal timed
        stamped = record.get("timestamp") is not None if timed is None else timed
        request_id = "chat" + text(source, line, "chat_id", record.get("chat_id", MISSING))
        ids = id_array(source, line, "hash_ids", record.get("hash_ids", MISSING), np.int64)
        request = TraceRequest(
            request_id=request_id,
            arrival_s=times.read(source, line, record.get("timestamp", MISSING)) if stamped else 0.0,
            input_length=length(source, line, "input_length", record.get("input_length", MISSING)),
            output_length=reading.output_length(source, line, "output_length", record.get("output_length", MISSING)),
            content=Synthetic(spans=((0, request_id),), blocks=Blocks(ids, reading.block_tokens or BLOCK_TOKENS)),
            line=source.line(line),
        )
        if timed is None and not stamped:
            reading.note("no timestamps in the file: all arrive at 0 unless a rate spreads them")
        timed = stamped
        return request

    return reading.json(make)


FORMAT = Format(
    name="bailian",
    about="Qwen-Bailian, JSON lines with hash ids of 16-token blocks",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=True,
    needs=("chat_id", "hash_ids"),
    time_unit="s",
    logged=True,
    draws_output=True,
    has_blocks=True,
    notes=("open loop: the turns of a chat keep their logged arrivals and do not wait for each other",),
)
