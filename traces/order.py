"""The order of a trace's requests: that of their arrivals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from traces.files.source import Source
from traces.requests.trace_request import TraceRequest


def in_order(source: Source, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """Pass the requests on as they are.

    Raises TraceError at the first that arrives before the one in front of it.
    """
    last_s, last_line = float("-inf"), 0
    for request in requests:
        if (arrival_s := request.arrival_s) is not None:
            if arrival_s < last_s:
                where = f" on line {last_line}" if last_line else ""
                who = "" if request.line else f" at request '{request.request_id}'"
                fault = source.error(
                    request.line, "", f"arrivals go back{who}: {arrival_s:.12g} s after {last_s:.12g} s{where}"
                )
                fault.hint = "--sort orders by arrival"
                raise fault
            last_s, last_line = arrival_s, request.line
        yield request


def by_arrival(requests: Iterable[TraceRequest], note: Callable[[str], None]) -> list[TraceRequest]:
    """Requests in the order of their arrivals, equal ones as they were. A session's later turns follow its first.

    All are held in memory.
    """
    started_s: dict[str, float] = {}
    keys: list[float] = []
    held: list[TraceRequest] = []
    for request in requests:
        held.append(request)
        if request.arrival_s is None:
            keys.append(started_s[request.session_id or ""])
            continue
        keys.append(request.arrival_s)
        if request.session_id is not None:
            started_s[request.session_id] = request.arrival_s
    order = sorted(range(len(held)), key=keys.__getitem__)
    moved = sum(after < before for before, after in pairwise(order))
    if moved:
        note(f"sorted by arrival: {moved} of {len(held)} requests came before one that stands in front of them")
    return [held[place] for place in order]
