"""A trace held in memory: parsed once, read by any number of runs."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import partial

from traces.requests.trace_request import TraceRequest
from traces.trace import Trace, TraceInfo


def in_memory(trace: Trace) -> Trace:
    """`trace` read to its end, as a trace that is read without its file. It can be pickled.

    Raises TraceError for a fault anywhere in the file.
    """
    requests = list(trace)
    info = trace.info
    held = TraceInfo(info.name, info.path, info.format, partial(bool, info.closed_loop), list(info.notes))
    return Trace(held, trace.source, partial(_again, requests))


def _again(requests: list[TraceRequest]) -> Iterator[TraceRequest]:
    # Copies, because who reshapes a trace writes new arrivals into its requests. The tokens are shared.
    return map(copy, requests)
