"""BLIS (inference-sim), the CSV of a trace: input_tokens, output_tokens, arrival_time_us, prefix_group, ..."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from traces.files.source import Source
from traces.files.values import count, length, seconds
from traces.formats.base import Format, Head, Reading
from traces.requests.content import Blocks, Synthetic, key_of
from traces.requests.trace_request import TraceRequest

_COLUMNS = ("input_tokens", "output_tokens", "arrival_time_us")
_OPTIONAL = (
    "server_input_tokens",
    "prefix_group",
    "prefix_length",
    "send_time_us",
    "status",
    "adapter",
    "slo_target_us",
    "session_id",
    "vllm_priority",
    "deadline_us",
)
_SCOPE = "prefix_group"


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """Read a file as `blis replay` does.

    A request is sent at `send_time_us` where there is one. Its prompt is the group's prefix, as long as the group's first
    row says, and then `input_tokens` of its own; without a group the server's count of prompt tokens goes before the
    client's.
    """
    present = tuple(name for name in _OPTIONAL if name in reading.head.columns)
    prefixes: dict[str, int] = {}
    turns = unread = 0

    def make(source: Source, line: int, cells: list[str]) -> TraceRequest | None:
        nonlocal turns, unread
        row = dict.fromkeys(_OPTIONAL, "") | dict(zip((*_COLUMNS, *present), cells, strict=True))
        if row["status"] not in ("", "ok"):
            reading.skip("failed request", "status other than ok")
            return None
        group = row["prefix_group"]
        own = count(source, line, "input_tokens", row["input_tokens"])
        served = count(source, line, "server_input_tokens", row["server_input_tokens"] or 0)
        prefix = count(source, line, "prefix_length", row["prefix_length"] or 0) if group else 0
        prefix = prefixes.get(group, prefix)
        input_length = length(source, line, "input_tokens", own + prefix if group else served or own)
        request_id = f"r{line}"
        blocks = Blocks(_group_id(group), prefix, _SCOPE) if prefix else None
        sent = seconds(source, line, "send_time_us", row["send_time_us"] or 0)
        target_us = seconds(source, line, "slo_target_us", row["slo_target_us"] or 0)
        request = TraceRequest(
            request_id=request_id,
            arrival_s=(sent or seconds(source, line, "arrival_time_us", row["arrival_time_us"])) / 1e6,
            input_length=input_length,
            output_length=length(source, line, "output_tokens", row["output_tokens"]),
            adapter=row["adapter"] or None,
            slo_ttft_s=target_us / 1e6 if target_us else None,
            content=Synthetic(spans=((0, request_id),), blocks=blocks),
            line=line,
        )
        if group:
            prefixes.setdefault(group, prefix)
        turns += bool(row["session_id"])
        unread += row["vllm_priority"] not in ("", "0") or row["deadline_us"] not in ("", "0")
        return request

    yield from reading.csv((*_COLUMNS, *present), make)
    if turns:
        reading.note(
            f"open loop: rounds of sessions ({turns}) keep their times and share no more than their prefix group"
        )
    if unread:
        reading.note(f"requests whose priority or deadline is not read: {unread}")


def _group_id(group: str) -> np.ndarray:
    return np.array([key_of(group) >> 1], np.int64)


FORMAT = Format(
    name="blis",
    about="BLIS (inference-sim), CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_COLUMNS,
)
