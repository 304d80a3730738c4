"""Traces at another rate, speed or length."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice

import numpy as np

from ground.errors import InputError
from traces.requests.trace_request import TraceRequest
from traces.since_first import check_span
from traces.trace import Trace, TraceInfo


def reshape(
    trace: Trace,
    rate: float | None = None,
    speedup: float | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Trace:
    """A view of `trace`, or itself where nothing is asked for; nothing is read until it is iterated.

    `requests` keeps the first so many requests of the file: a session may lose later turns, never earlier ones.

    `rate` stretches the arrivals so that they come at this many a second on average ((arrivals - 1) / (last - first)) and
    begin at 0; bursts keep their shape. A session counts once, by its start. It takes one pass over the file to know the
    trace's own rate. Arrivals that are all equal have no shape to keep: they become Poisson, drawn with `seed`.

    `speedup` divides the arrivals. Neither touches think times.

    Raises InputError for values that are not positive, or for a rate together with a speedup.
    """
    if rate is not None and speedup is not None:
        raise InputError("a rate and a speedup cannot be given together")
    for name, value in (("rate", rate), ("speedup", speedup), ("requests", requests)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} must be positive and finite, not {value}")
    if rate is None and speedup is None and requests is None:
        return trace
    info = replace(trace.info, notes=list(trace.info.notes))
    if requests is not None:
        info.note("only the first request" if requests == 1 else f"only the first {requests} requests")
        requests = min(requests, sys.maxsize)  # of what nobody has so many of, all
    if speedup is not None:
        info.note(f"arrivals {speedup:g} times as fast")
    # Read once a view, not once a pass.
    measure = cache(partial(_measure, trace, requests))
    return Trace(info, trace.source, partial(_read, trace, info, measure, rate, speedup, requests, seed))


def _measure(trace: Trace, requests: int | None) -> tuple[int, float, float]:
    """(arrivals, first, last)."""
    arrivals, first_s, last_s = 0, 0.0, 0.0
    for request in islice(trace, requests):
        if request.arrival_s is not None:
            if not arrivals:
                first_s = request.arrival_s
            last_s = request.arrival_s
            arrivals += 1
    return arrivals, first_s, last_s


def _read(
    trace: Trace,
    info: TraceInfo,
    measure: Callable[[], tuple[int, float, float]],
    rate: float | None,
    speedup: float | None,
    requests: int | None,
    seed: int,
) -> Iterator[TraceRequest]:
    first_s, stretch, why = 0.0, 1.0, ""
    if speedup is not None:
        stretch, why = 1.0 / speedup, f"a speedup of {speedup:g} makes it so"
    poisson: Iterator[float] | None = None
    if rate is not None:
        arrivals, first_s, last_s = measure()
        why = f"a rate of {rate:g}/s makes it so"
        span_s = last_s - first_s
        if span_s > 0:
            stretch = (arrivals - 1) / span_s / rate
            info.note(f"arrivals stretched from {(arrivals - 1) / span_s:.4g}/s to {rate:g}/s")
        else:
            poisson = _poisson_s(rate, seed)
            info.note(f"arrivals were all equal: now Poisson at {rate:g}/s, seed {seed}")
    first = True
    for request in islice(trace, requests):
        if first:  # what is known from the beginning, for a run that is stopped before the end
            first = False
            _pass_on(trace, info)
        arrival_s = request.arrival_s
        if arrival_s is not None:
            if poisson is not None:
                request = replace(request, arrival_s=next(poisson))
            elif stretch != 1.0 or first_s:
                request = replace(request, arrival_s=(arrival_s - first_s) * stretch)
            check_span(trace.source, request, why)
        yield request
    _pass_on(trace, info)


def _pass_on(trace: Trace, info: TraceInfo) -> None:
    for note in trace.info.notes:
        info.note(note)


def _poisson_s(rate: float, seed: int) -> Iterator[float]:
    """Arrival times, the first at 0."""
    rng = np.random.default_rng(seed)
    at_s = 0.0
    while True:
        for gap_s in rng.exponential(1 / rate, 1024).tolist():
            yield at_s
            at_s += gap_s
