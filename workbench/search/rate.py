"""The highest rate that a configuration sustains within an SLO, by bisection.

All runs of a search see the same requests in the same order with the same seed, and arrivals that differ in nothing but
scale (common random numbers): what differs between two runs is the rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from reports.metrics.cuts import cuts_of
from reports.metrics.refused import Refused, is_refused, refused
from reports.record.run_record import RunRecord
from traces import Trace
from traces.reshape import reshape
from workbench.cluster.simulate import simulate_loop
from workbench.search.causes import explain
from workbench.search.slo import Limit, Verdict, Watch, judge
from workbench.settings.run_settings import RunSettings

MOST_SIMULATIONS = 12
TOLERANCE = 0.02
BURST_RATE = 1e6
"""Requests/s that amount to: all at once."""
FIRST_GUESSES = (0.8, 0.4, 0.1, 0.01)
"""Shares of the throughput of a burst that are tried from the top until one keeps the SLO."""


@dataclass(frozen=True)
class Probe:
    """One simulation of a search."""

    rate: float
    """Arrivals/s; infinite: all at once. 0: one request at a time."""
    kept: bool
    stopped: bool
    """Before its end, because the SLO was lost."""
    measured_s: dict[str, float | None]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class HighestRate:
    """The outcome of a search for a rate."""

    rate: float
    """The highest rate at which the SLO was kept. 0: at none; infinite: even with all requests at once."""
    lost_at: float
    """The lowest rate at which it was not; less than 2 % above `rate` unless the simulations ran out."""
    burst_rps: float
    """Requests/s that it finishes when all come at once."""
    probes: tuple[Probe, ...]
    breaks: str
    """What breaks first and why, in one sentence; empty if nothing does."""
    at_rate: Probe | None
    """The run at `rate`."""
    target_kept: bool | None = None
    """Whether the SLO is kept at the rate asked for."""
    refused: Refused | None = None
    """Requests that can never be served, at no rate: the SLO is of the others."""
    cut: dict[str, dict[str, int]] = field(default_factory=dict)
    """Outputs that are cut short, by what cuts them, as in a run record's `totals.cut`."""


Simulate = Callable[[float, Watch | None], RunRecord]
"""Runs the trace at a rate (infinite: all at once; 0: one request at a time), perhaps stopping early."""


def simulator(settings: RunSettings, loop: str, trace: Trace, sha256: str, command: str) -> Simulate:
    """Runs of one configuration over one trace, which is held in memory."""

    def simulate(rate: float, watch: Watch | None) -> RunRecord:
        if rate == 0:
            alone = dataclasses.replace(settings, rate=None, speedup=None, concurrency=1)
            return simulate_loop(alone, loop, trace, trace_sha256=sha256, command=command, watch=watch)
        run = dataclasses.replace(settings, rate=min(rate, BURST_RATE), speedup=None)
        shaped = reshape(trace, run.rate, None, None, settings.seed)
        return simulate_loop(run, loop, shaped, trace_sha256=sha256, command=command, watch=watch)

    return simulate


def highest_rate(
    simulate: Simulate, limits: list[Limit], arrivals: int, requests: int, target: float | None = None
) -> HighestRate:
    """Search with at most `MOST_SIMULATIONS` runs.

    The first is a burst. Its throughput is what the configuration can do, and the search begins a little below. From there
    on every run halves the bracket (in logarithms) until it is narrower than `TOLERANCE`. With `arrivals` of a trace of
    `requests`. A `target` is decided as well, by a run of its own if it lies inside the last bracket.
    """
    search = _Search(simulate, limits, arrivals, requests)
    burst = search.run(math.inf, watched=False)
    if burst.kept or (search.refused is not None and search.refused.everything):
        return search.result(target)
    for share in FIRST_GUESSES:
        guess = share * search.burst_rps * arrivals / requests
        if search.run(guess).kept:
            break
    else:
        # Not even nearly idle: is it the load at all?
        if not search.run(0).kept:
            return search.result(target)
        search.run(FIRST_GUESSES[-1] / 10 * search.burst_rps * arrivals / requests)
    while search.kept_at and search.lost_at > search.kept_at * (1 + TOLERANCE) and search.left > (target is not None):
        # Above the throughput of the burst, which the tail of the burst may understate, steps are short.
        above = search.kept_at * (1.25 if len(search.probes) < 4 else 1.6)
        middle = math.sqrt(search.kept_at * search.lost_at) if math.isfinite(search.lost_at) else above
        search.run(middle)
    if target is not None and search.kept_at < target < search.lost_at and search.left:
        search.run(target)
    return search.result(target)


class _Search:
    """The state of a search: its runs, and the bracket they leave."""

    def __init__(self, simulate: Simulate, limits: list[Limit], arrivals: int, requests: int) -> None:
        self._simulate, self._limits = simulate, limits
        self._arrivals, self._requests = arrivals, requests
        self.probes: list[Probe] = []
        self.kept_at, self.lost_at = 0.0, math.inf
        self.burst_rps = 0.0
        self.refused: Refused | None = None
        self.cut: dict[str, dict[str, int]] = {}
        self._breaks = ""

    @property
    def left(self) -> int:
        return MOST_SIMULATIONS - len(self.probes)

    def run(self, rate: float, watched: bool = True) -> Probe:
        """Simulate at a rate and narrow the bracket."""
        span_s = self._arrivals / rate if rate and math.isfinite(rate) else self._requests / max(self.burst_rps, 1e-9)
        watch = Watch(self._limits, self._requests, span_s) if watched else None
        record = self._simulate(rate, watch)
        if math.isinf(rate):
            self.burst_rps = burst_rps(record)
            # Neither depends on the rate.
            self.refused, self.cut = refused(record), cuts_of(record) or {}
        stopped = watch is not None and watch.broken is not None
        if stopped:
            assert watch is not None and watch.broken is not None
            verdict = Verdict(False, dict.fromkeys((limit.name for limit in self._limits), None), (watch.broken,))
        else:
            verdict = judge(record, self._limits)
        probe = Probe(rate, verdict.kept, stopped, verdict.measured_s, verdict.broken)
        self.probes.append(probe)
        if rate == 0:
            if not verdict.kept:
                self._breaks = explain(record, self._limit(verdict), idle=True)
        elif verdict.kept:
            self.kept_at = max(self.kept_at, rate)
        elif rate < self.lost_at or not self._breaks:
            self.lost_at = min(self.lost_at, rate)
            self._breaks = explain(record, self._limit(verdict))
        return probe

    def _limit(self, verdict: Verdict) -> Limit:
        return next(limit for limit in self._limits if limit.name == verdict.broken[0])

    def result(self, target: float | None) -> HighestRate:
        at_rate = next((probe for probe in self.probes if probe.rate == self.kept_at and probe.kept), None)
        target_kept = None
        if target is not None:
            target_kept = True if target <= self.kept_at else False if target >= self.lost_at else None
        return HighestRate(
            self.kept_at,
            self.lost_at,
            self.burst_rps,
            tuple(self.probes),
            self._breaks,
            at_rate,
            target_kept,
            self.refused,
            self.cut,
        )


def burst_rps(record: RunRecord) -> float:
    """Requests/s from the first arrival to the last finish. The tail, with ever fewer of them running, makes it a little
    less than what is sustained with a queue that never empties: a point to start from."""
    finish_s = record.requests["finish_s"]
    ended = ~np.isnan(finish_s) & np.array([not is_refused(status) for status in record.requests["status"]], bool)
    if not ended.any():
        return 1.0
    return float(ended.sum()) / max(float(finish_s[ended].max() - record.requests["arrival_s"].min()), 1e-9)
