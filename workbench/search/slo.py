"""Service level objectives: what a run must keep, whether it did, and when it no longer can."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ground.errors import InputError
from reports.metrics.labels import Unit, written
from reports.metrics.percentiles import weighted_percentile
from reports.metrics.refused import is_refused
from reports.record.run_record import RunRecord
from workbench.recording.recorder import RequestRow

LATENCIES = ("ttft", "tpot", "itl", "e2e", "queue")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "": 1.0}
CHECKS = 50
"""How often in a trace's span of time a run is looked at for whether it still can keep its SLO."""


class SloError(InputError):
    """An SLO that says nothing that can be kept or broken, in one line."""


@dataclass(frozen=True)
class Limit:
    """One latency that must not be exceeded: its mean, or a percentile."""

    latency: str
    percent: float | None
    """None: the mean."""
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.latency}_{'mean' if self.percent is None else f'p{self.percent:g}'}"

    def __str__(self) -> str:
        return f"{self.name} {written([self.limit_s], Unit.SECONDS)[0]}"


def parse_slo(text: str) -> list[Limit]:
    """`ttft_p99=2s,tpot_p99=50ms`: latencies ttft, tpot, itl, e2e, queue; `mean` or any percentile; s, ms or us.

    Raises SloError, in one line, for an unknown latency, a limit that is not a time, and one given twice.
    """
    limits: list[Limit] = []
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        found = re.fullmatch(r"([a-z0-9]+)_(mean|p(\d+(?:\.\d+)?))", name.strip().lower())
        if found is None or found[1] not in LATENCIES:
            near = difflib.get_close_matches(name.partition("_")[0].lower(), LATENCIES, 1)
            hint = f"; did you mean {near[0]}_p99?" if near else ""
            asked = name.strip() or "''"
            raise SloError(f"slo: {asked} is not a latency ({', '.join(LATENCIES)}) with _mean or _p99{hint}")
        percent = float(found[3]) if found[3] else None
        if percent is not None and not 0 < percent <= 100:
            raise SloError(f"slo: {name.strip()}: there is no percentile {percent:g}")
        amount = re.fullmatch(r"([0-9.]+(?:e-?\d+)?)\s*([a-zµ]*)", value.strip().lower())
        if not equals or amount is None or amount[2] not in _UNITS:
            raise SloError(f"slo: {name.strip()}: {value.strip()!r} is not a time such as 2s or 50ms")
        try:
            limit_s = float(amount[1]) * _UNITS[amount[2]]
        except ValueError:
            raise SloError(f"slo: {name.strip()}: {value.strip()!r} is not a time such as 2s or 50ms") from None
        if not 0 < limit_s < math.inf:
            raise SloError(f"slo: {name.strip()}: the limit is not positive")
        limit = Limit(found[1], percent, limit_s)
        if any(limit.name == other.name for other in limits):
            raise SloError(f"slo: {limit.name} is given twice")
        limits.append(limit)
    return limits


def latency_values(record: RunRecord, latency: str) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, how many had it) over all requests that can be served at all. A request that did not finish never got its
    tokens: infinite. A request of one output token has no TPOT and is not counted there."""
    column = record.requests
    possible = np.array([not is_refused(status) for status in column["status"]], dtype=bool)
    if latency == "itl":
        lost = sum(status != "finished" for status in column["status"]) - int((~possible).sum())
        return np.append(record.itl[0], np.inf), np.append(record.itl[1], lost)
    finished = np.array([status == "finished" for status in column["status"]], dtype=bool)
    arrival_s = column["arrival_s"]
    if latency == "tpot":
        gaps = column["output_tokens"] - 1
        values = (column["finish_s"] - column["first_token_s"]) / np.maximum(gaps, 1)
        kept = ((gaps > 0) | ~finished) & possible
        values, finished = values[kept], finished[kept]
    else:
        end = {"ttft": "first_token_s", "e2e": "finish_s", "queue": "scheduled_s"}[latency]
        values, finished = (column[end] - arrival_s)[possible], finished[possible]
    values = np.where(finished, values, np.inf)
    return values, np.ones(len(values), np.int64)


def measured_s(record: RunRecord, limit: Limit) -> float | None:
    """The latency a limit is about: as `metrics.summarise` has it where every request finished. None without any."""
    values, counts = latency_values(record, limit.latency)
    values, counts = values[counts > 0], counts[counts > 0]
    if not len(values):
        return None
    if limit.percent is None:
        return float(np.average(values, weights=counts))
    if np.isinf(values).any():
        # Interpolating towards infinity has no answer: the rank above decides.
        order = np.argsort(values, kind="stable")
        upto = np.cumsum(counts[order])
        rank = math.ceil((int(upto[-1]) - 1) * limit.percent / 100 - 1e-9)
        value = float(values[order][np.searchsorted(upto, rank, side="right")])
        if math.isinf(value):
            return value
    return weighted_percentile(values, counts, limit.percent)


@dataclass(frozen=True)
class Verdict:
    """Verdict on whether a run kept its SLO."""

    kept: bool
    measured_s: dict[str, float | None]
    """By the name of a limit. Of a run that was stopped early, what it came to until then is not known: None."""
    broken: tuple[str, ...]
    """Names of the limits that were exceeded, the most exceeded first."""


def judge(record: RunRecord, limits: Sequence[Limit]) -> Verdict:
    """Compare a complete run with its limits."""
    measured = {limit.name: measured_s(record, limit) for limit in limits}
    over = {
        limit.name: value / limit.limit_s
        for limit in limits
        if (value := measured[limit.name]) is not None and value > limit.limit_s
    }
    return Verdict(not over, measured, tuple(sorted(over, key=lambda name: -over[name])))


class Watch:
    """Looks at a run on its way and says when its SLO can no longer be kept, so that it can be stopped.

    It never stops a run that would have kept it: with n requests in the trace, a percentile is exceeded for certain once
    so many have exceeded the limit that even if all others stay below, the value at the percentile's rank is above it.
    Requests that still wait count from the moment they have waited too long. Means and ITL are judged at the end only.
    """

    def __init__(self, limits: Sequence[Limit], requests: int, span_s: float) -> None:
        self._every_s = max(span_s / CHECKS, 1e-3)
        self.due_s = self._every_s
        self.broken: str | None = None
        """The limit that the run was stopped for."""
        self._allowed = [
            (limit, requests - math.floor((requests - 1) * limit.percent / 100))
            for limit in limits
            if limit.percent is not None and limit.latency in ("ttft", "tpot", "e2e", "queue")
        ]

    def __call__(self, now_s: float, rows: Sequence[RequestRow]) -> bool:
        """Tell whether to stop, looking at all requests that have arrived by now."""
        self.due_s = now_s + self._every_s
        for limit, enough in self._allowed:
            if (
                sum(not is_refused(row.status) and _exceeds(row, limit.latency, limit.limit_s, now_s) for row in rows)
                >= enough
            ):
                self.broken = limit.name
                return True
        return False


def _exceeds(row: RequestRow, latency: str, limit_s: float, now_s: float) -> bool:
    if latency == "tpot":
        tokens = row.output_tokens
        return tokens > 1 and row.finish_s - row.first_token_s > limit_s * (tokens - 1)
    end_s = {"ttft": row.first_token_s, "e2e": row.finish_s, "queue": row.scheduled_s}[latency]
    if end_s != end_s:  # not yet; one that ended without will never have it
        end_s = now_s if row.finish_s != row.finish_s else math.inf
    return end_s - row.arrival_s > limit_s
