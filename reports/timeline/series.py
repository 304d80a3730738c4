"""Lines of the page's charts: columns of a record cut down to a few hundred points, deterministically.

Everything over time is a mean over equal buckets of simulated time (exact: areas of step functions, not samples), all
runs on the same buckets, so that their charts share one axis. A latency distribution is its exact cumulative share at a
few hundred values spread evenly over the ranks, denser in the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reports.metrics.intervals import covered, union
from reports.metrics.summary import latency_samples, run_span, work_intervals
from reports.metrics.time_use import CAUSES, idle_pieces
from reports.record.run_record import RunRecord
from reports.record.schema import MODES

POINTS_ON_PAGE = 8_000
"""Buckets of all runs together: keeps a page of many runs below 2 MB."""
MOST_BUCKETS, FEWEST_BUCKETS = 1000, 100
ITERATIONS_A_BUCKET = 8
"""Short runs get fewer buckets: with hardly a batch in each, a mean over time is only noise."""

_RANKS = np.concatenate((np.linspace(0, 0.95, 150), 1 - np.geomspace(0.05, 1e-4, 60), [1.0]))


def latency_cdfs(records: Mapping[str, RunRecord]) -> dict[str, dict[str, Any]]:
    """Per latency (`ttft`, `tpot`, `itl`, `e2e`): `x` seconds, and per run the share of values up to each x."""
    samples = {name: latency_samples(record) for name, record in records.items()}
    charts = {}
    for latency in ("ttft", "tpot", "itl", "e2e"):
        ordered = {name: _ordered(*of_run[latency]) for name, of_run in samples.items()}
        x = np.unique(np.concatenate([_at_ranks(*run) for run in ordered.values()]))
        charts[latency] = {"x": _short(x), "runs": {name: _shares(*run, x) for name, run in ordered.items()}}
    return charts


def _ordered(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, kind="stable")
    return values[order], np.cumsum(counts[order])


def _at_ranks(values: np.ndarray, upto: np.ndarray) -> np.ndarray:
    if not len(values):
        return values
    return values[np.searchsorted(upto, np.rint(_RANKS * (upto[-1] - 1)), side="right")]


def _shares(values: np.ndarray, upto: np.ndarray, x: np.ndarray) -> list[float | None]:
    if not len(values):
        return [None] * len(x)
    place = np.searchsorted(values, x, side="right")
    return _short(np.where(place > 0, upto[np.maximum(place - 1, 0)], 0) / upto[-1])


def over_time(records: Mapping[str, RunRecord]) -> dict[str, Any]:
    """`t` (the middle of each bucket, seconds), `bucket_s`, per run the series named in `run_over_time`, and `last`: per run
    the last bucket that its time fills. Beyond it a run has no line: zero would be said of a run that is over."""
    spans = [span for record in records.values() if (span := run_span(record)) is not None]
    if not spans:
        return {"t": [], "bucket_s": None, "runs": {}, "last": {}}
    most_iterations = max(int((record.iterations["stage"] == 0).sum()) for record in records.values())
    wanted = min(POINTS_ON_PAGE // len(records), most_iterations // ITERATIONS_A_BUCKET)
    buckets = int(np.clip(wanted, FEWEST_BUCKETS, MOST_BUCKETS))
    edges_s = np.linspace(min(begin for begin, _ in spans), max(end for _, end in spans), buckets + 1)
    return {
        "t": _short((edges_s[1:] + edges_s[:-1]) / 2),
        "bucket_s": float(f"{edges_s[1] - edges_s[0]:.4g}"),
        "runs": {
            name: {series: _short(values) for series, values in run_over_time(record, edges_s).items()}
            for name, record in records.items()
        },
        "last": {name: _last_bucket(record, edges_s) for name, record in records.items()},
    }


def _last_bucket(record: RunRecord, edges_s: np.ndarray) -> int:
    span = run_span(record)
    whole = int(np.searchsorted(edges_s, span[1], side="right")) - 2 if span is not None else 0
    return max(whole, 0)


def run_over_time(record: RunRecord, edges_s: np.ndarray) -> dict[str, np.ndarray]:
    """The series of one run, one value a bucket, summed over instances.

    `running`, `waiting`, `kv`: time-weighted means; `decode_tokens`, `prefill_tokens`: computed per second, counted
    when the forward pass has left the last stage; `batch` and `batch_tokens`: mean requests and
    tokens a batch, NaN where none was launched, `batch_prefill` and `batch_decode` those by kind; `hit_rate`: share of
    the prompt tokens of requests first scheduled then that the prefix cache held, NaN where none was; `busy`
    and `prefill`, `decode`, `mixed`: shares of the time of all stages, and `idle_cpu`, `idle_kv`, ... what idles by
    cause (time_use.CAUSES). All NaN for a record without iterations.
    """
    column = record.iterations
    width_s = np.diff(edges_s)
    buckets = len(width_s)
    instances = sorted(set(column["instance"].tolist()))
    stages = [int(column["stage"][column["instance"] == instance].max(initial=0)) + 1 for instance in instances]
    first, last = column["stage"] == 0, np.zeros(len(column["stage"]), bool)
    for instance, count in zip(instances, stages, strict=True):
        last |= (column["instance"] == instance) & (column["stage"] == count - 1)
    all_s = width_s * max(1, sum(stages))
    series = {name: np.zeros(buckets) for name in ("running", "waiting", "kv")}
    by_mode = np.zeros((len(MODES), buckets))
    for instance, count in zip(instances, stages, strict=True):
        mine = column["instance"] == instance
        rows = mine & first
        _, leaves_s = work_intervals(record, instance, edges_s[0], edges_s[-1])
        at_s = column["start_s"][rows]
        for name, values in (("running", "running"), ("waiting", "waiting"), ("kv", "kv_used_tokens")):
            # Counts stand until the next batch, but fall to zero when the last request leaves; the cache keeps its KV.
            ends_s = leaves_s if name != "kv" else leaves_s[:0]
            series[name] += _step_means(at_s, column[values][rows], ends_s, edges_s)
        for stage in range(count):
            for mode in range(len(MODES)):
                chosen = mine & (column["stage"] == stage) & (column["mode"] == mode)
                if chosen.any():
                    busy = union(column["start_s"][chosen], column["end_s"][chosen])
                    by_mode[mode] += np.diff(covered(busy, edges_s))
    by_mode /= all_s
    launched, _ = np.histogram(column["start_s"][first], bins=edges_s)
    members, _ = np.histogram(column["start_s"][first], bins=edges_s, weights=column["requests"][first])
    series["batch"] = np.where(launched > 0, members / np.maximum(launched, 1), np.nan)
    tokens = (column["prefill_tokens"] + column["decode_tokens"])[first]
    computed, _ = np.histogram(column["start_s"][first], bins=edges_s, weights=tokens)
    series["batch_tokens"] = np.where(launched > 0, computed / np.maximum(launched, 1), np.nan)
    for name in ("prefill", "decode"):
        of_kind, _ = np.histogram(column["start_s"][first], bins=edges_s, weights=column[f"{name}_tokens"][first])
        series[f"batch_{name}"] = np.where(launched > 0, of_kind / np.maximum(launched, 1), np.nan)
    series["hit_rate"] = _hit_rate(record, edges_s)
    for name in ("decode_tokens", "prefill_tokens"):
        passed, _ = np.histogram(column["end_s"][last], bins=edges_s, weights=column[name][last])
        series[name] = passed / width_s
    series["busy"] = by_mode.sum(axis=0)
    series |= dict(zip(MODES, by_mode, strict=True))
    for name in CAUSES:
        series[f"idle_{name}"] = np.zeros(buckets)
    for instance, count in zip(instances, stages, strict=True):
        pieces = idle_pieces(record, instance, count, edges_s[0], edges_s[-1])
        seconds = np.diff(pieces.edges_s)
        for stage_causes in pieces.cause:
            for place, name in enumerate(CAUSES):
                upto = np.concatenate(([0.0], np.cumsum(np.where(stage_causes == place, seconds, 0.0))))
                idle_s = np.diff(np.interp(edges_s, pieces.edges_s, upto))
                series[f"idle_{name}"] += idle_s / all_s
    # A load test of somebody else's server has no iterations: unknown is not zero.
    return series if instances else {name: np.full(buckets, np.nan) for name in series}


def _hit_rate(record: RunRecord, edges_s: np.ndarray) -> np.ndarray:
    column = record.requests
    scheduled = ~np.isnan(column["scheduled_s"])
    at_s = column["scheduled_s"][scheduled]
    tokens, _ = np.histogram(at_s, bins=edges_s, weights=column["input_tokens"][scheduled])
    cached, _ = np.histogram(at_s, bins=edges_s, weights=column["cached_tokens"][scheduled])
    return np.where(tokens > 0, cached / np.maximum(tokens, 1), np.nan)


def _step_means(at_s: np.ndarray, values: np.ndarray, zero_s: np.ndarray, edges_s: np.ndarray) -> np.ndarray:
    """Mean in each bucket of a step function: `values` from `at_s` on, zero before the first and from each `zero_s`."""
    times = np.concatenate(([edges_s[0]], zero_s, at_s))
    heights = np.concatenate((np.zeros(1 + len(zero_s)), values))
    order = np.argsort(times, kind="stable")
    times, heights = times[order], heights[order]
    times = np.append(times, max(edges_s[-1], times[-1]))
    area = np.concatenate(([0.0], np.cumsum(heights * np.diff(times))))
    return np.diff(np.interp(edges_s, times, area)) / np.diff(edges_s)


def _short(values: np.ndarray) -> list[float | None]:
    """Six significant digits, None for NaN: what JSON holds and a screen can show."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
