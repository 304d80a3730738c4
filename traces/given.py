"""Requests that code of one's own gives: by a reader of another format, or as a list. They are checked as a file's are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from traces.files.source import Source
from traces.files.values import MOST, count, flag, integer, length, seconds, text
from traces.formats import Format, Head, Reading
from traces.requests.content import TokenIds
from traces.requests.trace_request import TraceRequest
from traces.trace import ReadAs, Trace, trace_by
from traces.write import json_line

_SAID = {field.name for field in fields(Format)} - {"name", "sniff", "read", "ids_from_file"}
"""Fields of a format that a reader may have."""

_VALUES: tuple[tuple[str, Callable[[Source, int, str, Any], Any], bool], ...] = (
    ("arrival_s", seconds, False),
    ("input_length", length, True),
    ("output_length", length, True),
    ("max_tokens", partial(length, most=MOST), False),
    ("turn", count, True),
    ("think_time_s", seconds, True),
    ("priority", integer, True),
    ("adapter", text, False),
    ("slo_ttft_s", seconds, False),
    ("slo_tpot_s", seconds, False),
    ("constrained", flag, True),
)
"""Fields of a request, what makes a value of ours of each, and whether it has to have one."""


class Reader(Protocol):
    """Reader of a format of one's own. Attributes named as fields of :class:`Format` say what is not as usual."""

    def read(self, reading: Reading) -> Iterable[TraceRequest]:
        """The requests of `reading.source`, in file order; arrivals in seconds, from any zero. Called for each pass."""
        ...


def own_format(name: str, reader: Reader) -> Format:
    """The format that `reader` reads, under a name for errors and records."""

    def read(reading: Reading) -> Iterator[TraceRequest]:
        return checked(reader.read(reading), reading.source)

    said: dict[str, Any] = {field: getattr(reader, field) for field in _SAID if hasattr(reader, field)}
    usual: dict[str, Any] = {"about": "a format of one's own", "closed_loop": None}
    return Format(**usual | said, name=name, sniff=lambda head: False, read=read, ids_from_file=True)


def trace_of(requests: Sequence[TraceRequest], name: str = "requests", ordered: bool = True) -> Trace:
    """Requests as a trace called `name`. They are copied on every pass; without `ordered`, arrivals may go back.

    Raises TraceError, when it is read, for the first that is no request or does not go with those before it.
    """
    held = tuple(requests)
    given = Format(
        name="requests",
        about="given by a program",
        sniff=lambda head: False,
        read=lambda reading: checked(held, reading.source),
        closed_loop=None,
        ids_from_file=True,
    )
    return trace_by(given, _Given(Path(name), requests=held), Head(), ReadAs(given, ordered=ordered))


def checked(requests: Iterable[Any], source: Source) -> Iterator[TraceRequest]:
    """Copies of requests from a program. Raises TraceError for what a reader of ours would not have let through."""
    turns: dict[str, int] = {}
    if not isinstance(requests, Iterable):
        raise source.error(0, "", f"is read as {str(requests)[:40]!r}, which is no requests")
    for number, request in enumerate(requests):
        place = source if getattr(request, "line", 0) else replace(source, place=f"[{number}]")
        _check_type(place, request)
        line, request = request.line, copy(request)
        text(place, line, "request_id", request.request_id)
        for field, read, needed in _VALUES:
            value = getattr(request, field)
            if needed or value is not None:
                plain = value.item() if isinstance(value, np.generic) else value
                setattr(request, field, read(place, line, field, plain))
        if isinstance(request.content, TokenIds):
            _check_ids(place, request)
        _check_turn(place, request, turns)
        yield request


def _check_type(place: Source, request: object) -> None:
    if not isinstance(request, TraceRequest):
        raise place.error(0, "", f"is {str(request)[:40]!r} of type {type(request).__name__}, not a TraceRequest")


def _check_ids(place: Source, request: TraceRequest) -> None:
    """Token ids are as many as the lengths say."""
    content = request.content
    assert isinstance(content, TokenIds)
    for field, ids, tokens in (
        ("input_length", content.prompt, request.input_length),
        ("output_length", content.output, request.output_length),
    ):
        if ids is not None and len(np.atleast_1d(ids)) != tokens:
            raise place.error(request.line, field, f"is {tokens}, and there are {len(ids)} token ids")


def _check_turn(place: Source, request: TraceRequest, turns: dict[str, int]) -> None:
    """First turns arrive, later ones follow."""
    line, session, turn = request.line, request.session_id, request.turn
    if session is None and (turn or request.arrival_s is None):
        raise place.error(line, "session_id", "is missing: only a session's later turn has a number and no arrival")
    if session is not None:
        if turn != turns.get(session, -1) + 1:
            raise place.error(
                line, "turn", f"is {turn}, and session '{session}' goes on with {turns.get(session, -1) + 1}"
            )
        turns[session] = turn
    if turn == 0 and request.arrival_s is None:
        raise place.error(line, "arrival_s", "is missing")


@dataclass(frozen=True, slots=True)
class _Given(Source):
    """Stand-in for a file where a program gives the requests."""

    requests: tuple[TraceRequest, ...] = ()

    def sha256(self) -> str:
        """Hex digest of the file that :func:`traces.write.write_trace` makes of them."""
        digest = hashlib.sha256()
        for number, request in enumerate(self.requests):
            _check_type(replace(self, place=f"[{number}]"), request)
            digest.update(json_line(request))
        return digest.hexdigest()
