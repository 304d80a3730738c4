"""Two runs of one trace, request by request: how far the second is from the first, and why.

The first run, A, is the reference, usually the measured one; B is the prediction. An error is (B - A) / A.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reports.record.errors import RecordError
from reports.record.run_record import RunRecord
from reports.record.schema import FINISHED, HOST_PHASES

LATENCIES = ("ttft", "tpot", "e2e", "queue")
PERCENTILES = (50, 90, 99)
LEAST_FOR_SHARES_S = 1e-3
"""A reference below this (a request that hardly queued) makes a mean of relative errors meaningless."""
WINDOWS = 20
"""Equal parts of the reference's duration over which throughput is compared."""


@dataclass
class LatencyError:
    """One latency of all requests that finished in both runs."""

    reference_mean_s: float
    mean_difference_s: float
    """B's mean less A's."""
    mean: float | None
    """Error of the mean; None, as below, where the reference is 0: a run without any queueing."""
    percentiles: dict[str, float | None]
    """Error of p50, p90 and p99."""
    absolute_mean: float | None
    """Mean over requests of the absolute error; None where the reference is next to nothing for some."""
    absolute_median: float | None
    signed_mean: float | None
    signed_median: float | None


@dataclass
class Comparison:
    """The findings of :func:`compare`."""

    a: str
    b: str
    requests: int
    """Finished in both."""
    latency_from: str
    """Moment that latencies count from: ``arrival`` or ``queued``."""
    latencies: dict[str, LatencyError]
    duration_a_s: float
    duration_b_s: float
    throughput: dict[str, list[float]]
    """Output tokens a second of finished requests over windows of A's duration: ``t_s``, ``a``, ``b``."""
    throughput_error: float | None
    """Mean over windows of the absolute difference, as a share of A's mean throughput; None where A has none."""
    decisions: dict[str, Any] | None = None
    """First difference between the schedulers' decisions; None without both files."""
    budget: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    """A's and B's seconds of each latency, request by request."""

    def to_dict(self) -> dict[str, Any]:
        """Give the findings as JSON has them, without the single requests."""
        return dataclasses.asdict(dataclasses.replace(self, pairs={}))


def compare(a: RunRecord, b: RunRecord, latency_from: str | None = None) -> Comparison:
    """Compare two records of one trace.

    ``latency_from`` is ``arrival`` or ``queued``; without it the reference says (``meta["latency_from"]``), else
    ``arrival``. Raises RecordError when the runs are not of the same requests.
    """
    notes: list[str] = []
    a = _without_lost(a, b, notes)
    order = _match(a, b, notes)
    origin = latency_from or a.meta.get("latency_from") or b.meta.get("latency_from") or "arrival"
    both = np.array(
        [x == y == FINISHED for x, y in zip(a.requests["status"], _pick(b.requests["status"], order), strict=True)],
        bool,
    )
    if not both.any():
        raise RecordError(f"{a.name} and {b.name}: no request finished in both")
    if not both.all():
        notes.append(f"{int((~both).sum())} requests did not finish in both runs and are left out")
    of_a, of_b = _latencies(a, None, origin), _latencies(b, order, origin)
    latencies, pairs = {}, {}
    for name in LATENCIES:
        x, y = of_a[name][both], of_b[name][both]
        known = ~(np.isnan(x) | np.isnan(y))
        if known.any():
            latencies[name] = _error(x[known], y[known])
            pairs[name] = x[known], y[known]
    window = _throughput(a, b, order, both)
    return Comparison(
        a.name,
        b.name,
        int(both.sum()),
        origin,
        latencies,
        _duration(a),
        _duration(b),
        window,
        _mean_gap(window),
        notes=notes,
        pairs=pairs,
    )


def _without_lost(a: RunRecord, b: RunRecord, notes: list[str]) -> RunRecord:
    """A without the requests that it did not finish and B was not given: the trace that is made of a measured run has
    only what came of it."""
    ids_a, ids_b = a.requests["request_id"], set(b.requests["request_id"])
    lost = np.array([x not in ids_b for x in ids_a], bool)
    done = np.array([status == FINISHED for status in a.requests["status"]], bool)
    if len(ids_a) - len(ids_b) != lost.sum() or not lost.any() or (lost & done).any():
        return a
    notes.append(f"requests that did not finish in {a.name} and are not in {b.name}, left out: {int(lost.sum())}")
    kept = np.flatnonzero(~lost)
    columns = {
        name: [values[i] for i in kept] if isinstance(values, list) else values[kept]
        for name, values in a.requests.items()
    }
    return RunRecord(a.meta, columns, a.iterations, a.itl, a.events)


def _match(a: RunRecord, b: RunRecord, notes: list[str]) -> np.ndarray:
    """Find the place in B of every request of A: by id, or by order where the ids are different names for the same
    trace."""
    ids_a, ids_b = a.requests["request_id"], b.requests["request_id"]
    if len(ids_a) != len(ids_b):
        raise RecordError(f"{a.name} and {b.name} are not runs of one trace: {len(ids_a)} requests and {len(ids_b)}")
    if set(ids_a) == set(ids_b):
        place = {request_id: i for i, request_id in enumerate(ids_b)}
        order = np.array([place[request_id] for request_id in ids_a])
    else:
        order = np.arange(len(ids_a))
        notes.append("the runs name their requests differently: matched by their order in the trace")
    ended = np.array([s == FINISHED for s in a.requests["status"]]) & np.array(
        [b.requests["status"][i] == FINISHED for i in order]
    )
    for column in ("input_tokens", "output_tokens"):
        x, y = a.requests[column], b.requests[column][order]
        same = x == y
        if column == "output_tokens":
            same |= ~ended
        else:
            same |= ~ended & (np.minimum(x, y) == 0)  # not every client says how long a prompt was that failed
        if not same.all():
            at = int((~same).argmax())
            raise RecordError(
                f"{a.name} and {b.name} are not runs of one trace: {column} of {ids_a[at]}: {x[at]} and {y[at]}"
            )
    return order


def _pick(values: list[str], order: np.ndarray) -> list[str]:
    return [values[i] for i in order]


def _latencies(record: RunRecord, order: np.ndarray | None, origin: str) -> dict[str, np.ndarray]:
    columns = record.requests
    take = slice(None) if order is None else order

    def of(name: str) -> np.ndarray:
        return columns[name][take]

    begin = of("queued_s" if origin == "queued" else "arrival_s")
    begin = np.where(np.isnan(begin), of("arrival_s"), begin)
    gaps = of("output_tokens") - 1
    first, last = of("first_token_s"), of("finish_s")
    return {
        "ttft": first - begin,
        "tpot": np.where(gaps > 0, (last - first) / np.maximum(gaps, 1), np.nan),
        "e2e": last - begin,
        "queue": of("scheduled_s") - begin,
    }


def _error(a: np.ndarray, b: np.ndarray) -> LatencyError:
    mean = float(a.mean())
    percentiles = {f"p{p}": _relative(float(np.percentile(b, p)), float(np.percentile(a, p))) for p in PERCENTILES}
    each = b / a - 1 if (a > LEAST_FOR_SHARES_S).all() else None
    return LatencyError(
        mean,
        float(b.mean()) - mean,
        _relative(float(b.mean()), mean),
        percentiles,
        *(
            None if each is None else float(value(each))
            for value in (lambda e: abs(e).mean(), lambda e: np.median(abs(e)), lambda e: e.mean(), np.median)
        ),
    )


def _relative(value: float, reference: float) -> float | None:
    return value / reference - 1 if reference > 0 else None


def _duration(record: RunRecord) -> float:
    columns = record.requests
    return float(np.nanmax(columns["finish_s"]) - np.nanmin(columns["arrival_s"]))


def _throughput(a: RunRecord, b: RunRecord, order: np.ndarray, both: np.ndarray) -> dict[str, list[float]]:
    """Tokens of a request are taken as evenly spread from its first to its last."""
    begin_a, begin_b = float(a.requests["arrival_s"].min()), float(b.requests["arrival_s"].min())
    edges = np.linspace(0.0, _duration(a), WINDOWS + 1)
    width = edges[1] - edges[0]
    if width <= 0:
        return {"t_s": [], "a": [], "b": []}
    rates = []
    for columns, take, begin in ((a.requests, slice(None), begin_a), (b.requests, order, begin_b)):
        last = columns["finish_s"][take][both] - begin
        first = columns["first_token_s"][take][both] - begin
        first = np.where(np.isnan(first), last, first)  # an answer in one piece
        tokens = columns["output_tokens"][take][both]
        span = np.maximum(last - first, 1e-9)
        done = tokens[:, None] * ((edges[None, :] - first[:, None]) / span[:, None]).clip(0, 1)
        rates.append((np.diff(done.sum(0)) / width).tolist())
    return {"t_s": (edges[:-1] + width / 2).tolist(), "a": rates[0], "b": rates[1]}


def _mean_gap(window: dict[str, list[float]]) -> float | None:
    x, y = np.array(window["a"]), np.array(window["b"])
    return float(abs(y - x).mean() / x.mean()) if x.sum() > 0 else None


# -- where decisions part ----------------------------------------------------------------------------------------------


def first_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """The first batch at which two schedulers decided differently, of each instance; batches are compared by what they
    hold.

    ``equal`` tells whether all of the shorter list is the same.
    """
    by_instance: list[dict[int, list[dict[str, Any]]]] = [{}, {}]
    for lines, grouped in zip((a, b), by_instance, strict=True):
        for line in lines:
            grouped.setdefault(int(line.get("instance", 0)), []).append(line)
    compared = 0
    for instance in sorted(set(by_instance[0]) | set(by_instance[1])):
        left, right = (grouped.get(instance, []) for grouped in by_instance)
        for number, (x, y) in enumerate(zip(left, right, strict=False)):
            differing = [key for key in ("mode", "prefill", "decode", "retracted") if x.get(key) != y.get(key)]
            if differing:
                return {
                    "equal": False,
                    "instance": instance,
                    "batch": number,
                    "differs_in": differing,
                    "a": {key: x.get(key) for key in differing},
                    "b": {key: y.get(key) for key in differing},
                    "equal_before": number,
                }
            compared += 1
        if len(left) != len(right):
            return {
                "equal": False,
                "instance": instance,
                "batch": min(len(left), len(right)),
                "differs_in": ["length"],
                "a": len(left),
                "b": len(right),
                "equal_before": min(len(left), len(right)),
            }
    return {"equal": True, "batches": compared}


# -- the error budget --------------------------------------------------------------------------------------------------


def phase_totals(record: RunRecord) -> dict[str, float] | None:
    """Seconds of GPU and of each CPU phase over a run; None when it has no iterations."""
    columns = record.iterations
    if not len(columns["start_s"]):
        return None
    first = columns["stage"] == 0
    return {
        "step_s": float((columns["end_s"] - columns["start_s"])[first].sum()),
        **{name: float(np.nansum(columns[name][first])) for name in HOST_PHASES},
    }
