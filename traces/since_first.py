"""Times counted from the first request of a trace, whatever they were counted from in its file."""

from __future__ import annotations

import math

from traces.files.source import Source
from traces.requests.trace_request import TraceRequest

MOST_SPAN_S = 4_000_000_000
"""From the first request to the last: 126 years, the longest time a run record holds."""
_DECIMALS = 9
"""A run record has nanoseconds."""
_NANOSECONDS_UNTIL_S = 2.0**23
"""Smaller floats are less than a nanosecond apart: 97 days."""


class SinceFirst:
    """A trace's clock: it stands at 0 when the first request arrives.

    Files begin where their writer's clock stood: at 0, at the first of the month, in 1970. Nothing that is simulated or
    sent depends on it, except that everybody would wait for the first request. A trace that begins at 0 is left as it is,
    to the last bit.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s

    @property
    def note(self) -> str:
        """Describe the shift; empty for a trace that begins at 0."""
        return (
            f"the first request arrives at {self._first_s:.15g} s: times are counted from there"
            if self._first_s
            else ""
        )

    def since_s(self, arrival_s: float) -> float:
        """Seconds from the first arrival to `arrival_s`, as many decimals as numbers of this size have: seconds since 1970
        are floats of a quarter of a microsecond, and what lies below that is not of the file."""
        if not self._first_s:
            return arrival_s
        if arrival_s < _NANOSECONDS_UNTIL_S and self._first_s < _NANOSECONDS_UNTIL_S:
            return round(arrival_s - self._first_s, _DECIMALS)
        decimals = math.floor(-math.log10(math.ulp(max(arrival_s, self._first_s))))
        return round(arrival_s - self._first_s, decimals)


def check_span(source: Source, request: TraceRequest, why: str = "are these seconds?") -> None:
    """Check that no request has a time that no run lasts. Raises TraceError, which says why that may be."""
    arrival_s, think_s = request.arrival_s or 0.0, request.think_time_s
    if max(arrival_s, think_s, request.slo_ttft_s or 0.0, request.slo_tpot_s or 0.0) <= MOST_SPAN_S:
        return
    for field in ("arrival_s", "think_time_s", "slo_ttft_s", "slo_tpot_s"):
        value_s = getattr(request, field)
        if value_s is not None and value_s > MOST_SPAN_S:
            # What a file calls an arrival differs from format to format.
            seconds = f"{value_s:,.0f} s" if value_s < 1e15 else f"{value_s:g} s"
            where, what = (
                ("", f"arrives {seconds} after the first request") if field == "arrival_s" else (field, f"is {seconds}")
            )
            raise source.error(request.line, where, f"{what}; a run lasts {MOST_SPAN_S:,} s at most: {why}")
