"""The numbers of a trace."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ground.errors import InputError
from traces.requests.trace_request import TraceRequest
from traces.reuse import PrefixReuse

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in five numbers."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Description:
    """Figures of a trace. None where there is nothing to take them from."""

    requests: int
    arrivals: int
    """Requests with an arrival of their own: all but the later turns of sessions."""
    span_s: float
    """From the first arrival to the last."""
    arrival_rate: float | None
    """Arrivals a second: (arrivals - 1) / span_s."""
    gap_cv: float | None
    """Burstiness: standard deviation of the gaps between arrivals over their mean; 1 for Poisson."""
    peak_rate_1s: float | None
    """Arrivals a second in the busiest second, and below in the busiest ten."""
    peak_rate_10s: float | None
    input_tokens: int
    output_tokens: int
    input_lengths: Spread
    output_lengths: Spread
    reusable_tokens: int
    """Input tokens that an unlimited prefix cache would serve."""
    reusable_share: float
    sessions: int
    turns: Spread | None
    """Turns of a session; None without sessions."""
    think_time_s: Spread | None
    """Think time before a later turn."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(requests: Iterable[TraceRequest]) -> Description:
    """Read a trace once and sum it up.

    Raises InputError when there are no requests, and TraceError when the trace is at fault.
    """
    arrivals_s, inputs, outputs, thinks_s = array("d"), array("q"), array("q"), array("d")
    turns: dict[str, int] = {}
    reuse, reusable = PrefixReuse(), 0
    for request in requests:
        inputs.append(request.input_length)
        outputs.append(request.output_length)
        if request.arrival_s is not None:
            arrivals_s.append(request.arrival_s)
        if request.session_id is not None:
            turns[request.session_id] = request.turn + 1
            if request.turn:
                thinks_s.append(request.think_time_s)
        reusable += reuse.add(request)
    if not inputs:
        raise InputError("no requests to describe")
    times_s = np.frombuffer(arrivals_s, dtype=np.float64) if arrivals_s else np.empty(0)
    span_s = float(times_s[-1] - times_s[0]) if len(times_s) else 0.0
    gaps_s = np.diff(times_s)
    input_tokens = sum(inputs)
    return Description(
        requests=len(inputs),
        arrivals=len(times_s),
        span_s=span_s,
        arrival_rate=len(gaps_s) / span_s if span_s else None,
        gap_cv=float(gaps_s.std() / gaps_s.mean()) if span_s else None,
        peak_rate_1s=_peak_rate(times_s, 1.0) if span_s else None,
        peak_rate_10s=_peak_rate(times_s, 10.0) if span_s else None,
        input_tokens=input_tokens,
        output_tokens=sum(outputs),
        input_lengths=_spread(inputs),
        output_lengths=_spread(outputs),
        reusable_tokens=reusable,
        reusable_share=reusable / input_tokens,
        sessions=len(turns),
        turns=_spread(turns.values()) if turns else None,
        think_time_s=_spread(thinks_s) if thinks_s else None,
    )


def _peak_rate(times_s: np.ndarray, window_s: float) -> float:
    """Arrivals a second in the busiest window, wherever it begins."""
    ends = np.searchsorted(times_s, times_s + window_s, side="left")
    return float((ends - np.arange(len(times_s))).max() / window_s)


def _spread(values: Iterable[float]) -> Spread:
    data = np.fromiter(values, dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(data, QUANTILES))
    return Spread(mean=float(data.mean()), p50=p50, p90=p90, p99=p99, max=float(data.max()))
