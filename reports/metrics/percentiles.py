"""Means and percentiles, plain and weighted."""

from __future__ import annotations

import numpy as np

PERCENTILES = (50, 90, 99)


def weighted_percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """Exactly `numpy.percentile(numpy.repeat(values, counts), percent)`, without repeating anything.

    Linear interpolation between closest ranks (Hyndman and Fan's method 7, numpy's default), in numpy's own order of
    operations, so that not even the last bit differs. Raises `ValueError` when all counts are zero.
    """
    order = np.argsort(values, kind="stable")
    values, upto = values[order], np.cumsum(counts[order])
    total = int(upto[-1]) if len(upto) else 0
    if total == 0:
        raise ValueError("no values")
    rank = (total - 1) * (percent / 100)
    below = int(np.floor(rank))
    share = rank - below
    low = values[np.searchsorted(upto, below, side="right")]
    high = values[np.searchsorted(upto, min(below + 1, total - 1), side="right")]
    return float(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share)


def spread(name: str, values: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float | None]:
    """`{name}_mean_s`, `{name}_p50_s`, `{name}_p90_s` and `{name}_p99_s`; all None when there is no value.

    NaN stands for a moment that a request never had (the TPOT of a single token): those do not count.
    """
    labels = [f"{name}_mean_s", *(f"{name}_p{percent}_s" for percent in PERCENTILES)]
    if counts is None:
        values = values[~np.isnan(values)]
    if not len(values) or (counts is not None and not counts.sum()):
        return dict.fromkeys(labels)
    if counts is None:
        numbers = [float(values.mean()), *(float(value) for value in np.percentile(values, PERCENTILES))]
    else:
        numbers = [float(np.average(values, weights=counts))]
        numbers += [weighted_percentile(values, counts, percent) for percent in PERCENTILES]
    return dict(zip(labels, numbers, strict=True))
