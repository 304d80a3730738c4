"""AIBrix workloads: timestamp (ms) and the requests of that moment, with prompt or prompt_length and output_length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from traces.files.source import Source
from traces.files.values import MISSING, length
from traces.formats.base import Format, Head, Reading
from traces.requests.content import Content, TokenIds, unique
from traces.requests.text import encode
from traces.requests.trace_request import TraceRequest

_FIELDS = ("timestamp", "requests")


def _sniff(head: Head) -> bool:
    return head.has(*_FIELDS)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    """Requests of a session keep the times they were given, so they are no session here."""
    times = reading.times("timestamp")

    def make(source: Source, line: int, record: dict[str, Any]) -> list[TraceRequest]:
        arrival = times.read(source, line, record.get("timestamp", MISSING))
        listed = record.get("requests")
        if not isinstance(listed, list):
            raise source.error(line, "requests", "is missing or not a list")
        return [
            _request(reading, source, line, f"requests[{n}]", f"r{line}.{n}", arrival, request)
            for n, request in enumerate(listed)
        ]

    return chain.from_iterable(reading.json(make))


def _request(
    reading: Reading, source: Source, line: int, where: str, request_id: str, arrival: float, request: Any
) -> TraceRequest:
    if not isinstance(request, dict):
        raise source.error(line, where, "is not a JSON object")
    content: Content
    if isinstance(request.get("prompt"), str) and (reading.tokenizer or request.get("prompt_length") is None):
        field = f"{where}.prompt"
        prompt = encode(reading.tokenizer, source, line, field, request["prompt"])
        if not len(prompt):
            raise source.error(line, field, "is empty; a request has at least 1 token")
        content, input_length = TokenIds(prompt, None, str(source.path), source.field(field)), len(prompt)
    else:
        input_length = length(source, line, f"{where}.prompt_length", request.get("prompt_length", MISSING))
        content = unique(request_id)
    output = request.get("output_length", MISSING)
    return TraceRequest(
        request_id=request_id,
        arrival_s=arrival,
        input_length=input_length,
        output_length=reading.output_length(source, line, f"{where}.output_length", output),
        content=content,
        line=source.line(line),
    )


FORMAT = Format(
    name="aibrix",
    about="AIBrix workload, JSON lines of requests by time",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
    needs=_FIELDS,
    time_unit="ms",
    draws_output=True,
)
