"""Agent sessions of callanjfox/kv-cache-tester (Weka): one session a line, its calls nested inside.

A subagent's calls run in the session's own chain, at the place where the subagent stands: after the call before it, and
before the call after it, as a coding agent waits for the subagents it sends out. Subagents that ran side by side run one
after the other. What each of its calls shares with others is in the block ids, as for any call.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from traces.files.counted import counted
from traces.files.source import Source
from traces.files.values import MISSING, id_array, length, runs, seconds, text
from traces.formats.base import Format, Head, Reading
from traces.formats.chains import Call, sequence_ids
from traces.requests.content import Blocks, Synthetic
from traces.requests.trace_request import TraceRequest


def _sniff(head: Head) -> bool:
    return head.has("id", "block_size", "requests")


def _read(reading: Reading) -> Iterator[TraceRequest]:
    derived = nested = 0

    def make(source: Source, line: int, session: dict[str, Any]) -> list[TraceRequest]:
        nonlocal derived, nested
        gaps = 0
        requests: list[TraceRequest] = []
        session_id = text(source, line, "id", session.get("id", MISSING))
        block_tokens = length(source, line, "block_size", session.get("block_size", MISSING))
        records = list(_flat(source, line, session.get("requests", MISSING), "requests"))
        if not records:
            raise source.error(line, "requests", "is empty")
        calls = [
            Call(
                ids=_ids(source, line, where, record),
                input_length=length(source, line, f"{where}.in", record.get("in", MISSING)),
                output_length=length(source, line, f"{where}.out", record.get("out", MISSING)),
                tail_id=-number - 1,
            )
            for number, (where, record) in enumerate(records)
        ]
        # Ids local to the session get it as their scope; any other word means ids that the whole file shares.
        local = session.get("hash_id_scope", "local") == "local"
        before: dict[str, Any] = {}
        for turn, (call, ids) in enumerate(zip(calls, sequence_ids(calls, block_tokens), strict=True)):
            where, record = records[turn]
            think_s = 0.0
            if turn and "think_time" in record:
                think_s = seconds(source, line, f"{where}.think_time", record["think_time"])
            elif turn:
                think_s = _gap_s(source, line, where, before, record)
                gaps += 1
            request_id = f"{session_id}/{turn}"
            requests.append(
                TraceRequest(
                    request_id=request_id,
                    arrival_s=None if turn else 0.0,
                    input_length=call.input_length,
                    output_length=call.output_length,
                    session_id=session_id,
                    turn=turn,
                    think_time_s=think_s,
                    content=Synthetic(
                        spans=((0, request_id),),
                        blocks=Blocks(ids, block_tokens, scope=session_id if local else ""),
                    ),
                    line=source.line(line),
                )
            )
            before = record
        nested += any(where.count("requests") > 1 for where, _ in records)
        derived += gaps
        return requests

    yield from chain.from_iterable(reading.json(make))
    if derived:
        reading.note(f"think times that are missing and taken as the gap since the end of the call before: {derived}")
    if nested:
        reading.note(
            f"{counted(nested, 'session')} with subagents: their calls run in the session's chain, at their place"
        )


def _flat(source: Source, line: int, records: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the line, call), nested calls where their subagent stands."""
    if records is MISSING:
        raise source.error(line, where, "is missing")
    if not isinstance(records, list):
        raise source.error(line, where, "is not a list")
    for number, record in enumerate(records):
        place = f"{where}[{number}]"
        if not isinstance(record, dict):
            raise source.error(line, place, "is not a JSON object")
        if "requests" in record:
            yield from _flat(source, line, record["requests"], f"{place}.requests")
        else:
            yield place, record


def _ids(source: Source, line: int, where: str, record: dict[str, Any]) -> np.ndarray:
    """Block ids, as runs or, as the original files have them, one by one."""
    if "hash_ids" in record:
        return id_array(source, line, f"{where}.hash_ids", record["hash_ids"], np.int64)
    return runs(source, line, f"{where}.hash_rle", record.get("hash_rle", MISSING))


def _gap_s(source: Source, line: int, where: str, before: dict[str, Any], record: dict[str, Any]) -> float:
    """Seconds between the end of the call before and the start of this one; 0 when either is not in the file."""
    if "t" not in record or "t" not in before or "api_time" not in before:
        return 0.0
    started_s = seconds(source, line, f"{where}.t", record["t"])
    end_s = seconds(source, line, "t", before["t"]) + seconds(source, line, "api_time", before["api_time"])
    return round(max(0.0, started_s - end_s), 6)


FORMAT = Format(
    name="weka",
    about="kv-cache-tester (Weka) agent sessions, one session a line",
    sniff=_sniff,
    read=_read,
    closed_loop=True,
    ids_from_file=True,
    needs=("id", "block_size", "requests"),
    notes=("times are relative to each session's start: all sessions arrive at 0 unless a rate spreads them",),
)
