"""Means and percentiles, plain and weighted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 90, 99)


def weighted_percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """One of `weighted_percentiles`."""
    return weighted_percentiles(values, counts, [percent])[0]


def weighted_percentiles(values: np.ndarray, counts: np.ndarray, percents: Sequence[float]) -> list[float]:
    """Exactly `numpy.percentile(numpy.repeat(values, counts), percents)`, without repeating anything.

    Linear interpolation between closest ranks (Hyndman and Fan's method 7, numpy's default), in numpy's own order of
    operations, so that not even the last bit differs. Raises `ValueError` when all counts are zero.
    """
    order = np.argsort(values, kind="stable")
    values, upto = values[order], np.cumsum(counts[order])
    total = int(upto[-1]) if len(upto) else 0
    if total == 0:
        raise ValueError("no values")
    found = []
    for percent in percents:
        rank = (total - 1) * (percent / 100)
        below = int(np.floor(rank))
        share = rank - below
        low = values[np.searchsorted(upto, below, side="right")]
        high = values[np.searchsorted(upto, min(below + 1, total - 1), side="right")]
        found.append(float(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share))
    return found


def spread(name: str, values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float | None]:
    """`{name}_mean_s`, `{name}_p50_s`, `{name}_p90_s` and `{name}_p99_s`; all None when there is no value.

    Without counts, each counts once, but for NaN: it stands for a moment that a request never had (the TPOT of a single
    token).
    """
    labels = [f"{name}_mean_s", *(f"{name}_p{percent}_s" for percent in PERCENTILES)]
    if counts is None:
        values = values[~np.isnan(values)]
        counts = np.ones(len(values), dtype=np.int64)
    if not counts.sum():
        return dict.fromkeys(labels)
    numbers = [float(np.average(values, weights=counts)), *weighted_percentiles(values, counts, PERCENTILES)]
    return dict(zip(labels, numbers, strict=True))
