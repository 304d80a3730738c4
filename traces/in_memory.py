"""A trace held in memory: parsed once, read by any number of runs."""

from __future__ import annotations

from functools import partial

from traces.trace import Trace, TraceInfo


def in_memory(trace: Trace) -> Trace:
    """`trace` read to its end, as a trace that is read without its file. It can be pickled.

    Raises TraceError for a fault anywhere in the file.
    """
    requests = list(trace)
    info = trace.info
    held = TraceInfo(info.name, info.path, info.format, partial(bool, info.closed_loop), list(info.notes))
    # The same requests again and again: nobody writes into one, and who reshapes a trace makes new ones.
    return Trace(held, trace.source, partial(iter, requests))
