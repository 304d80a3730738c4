"""Sets of moments as disjoint sorted intervals: what is needed to say for how long something was idle, and why."""

from __future__ import annotations

import numpy as np


def union(start_s: np.ndarray, end_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unite intervals into disjoint ones, in order; empty intervals are dropped."""
    real = end_s > start_s
    start_s, end_s = start_s[real], end_s[real]
    if not len(start_s):
        return start_s, end_s
    if (start_s[1:] < start_s[:-1]).any():  # mostly they come in order
        order = np.argsort(start_s, kind="stable")
        start_s, end_s = start_s[order], end_s[order]
    covered_to_s = np.maximum.accumulate(end_s)
    opens = np.concatenate(([True], start_s[1:] > covered_to_s[:-1]))
    closes = np.concatenate((opens[1:], [True]))
    return start_s[opens], covered_to_s[closes]


def length(intervals: tuple[np.ndarray, np.ndarray]) -> float:
    """Add up the lengths of disjoint intervals."""
    start_s, end_s = intervals
    return float(np.sum(end_s - start_s))


def overlap(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Measure the overlap of two sets of disjoint sorted intervals."""
    if not len(one[0]) or not len(other[0]):
        return 0.0
    return float(np.sum(covered(one, other[1]) - covered(one, other[0])))


def covered(intervals: tuple[np.ndarray, np.ndarray], at_s: np.ndarray) -> np.ndarray:
    """Measure how much of `intervals` lies before each moment of `at_s`."""
    start_s, end_s = intervals
    if not len(start_s):
        return np.zeros(len(at_s))
    before = np.concatenate(([0.0], np.cumsum(end_s - start_s)))
    place = np.searchsorted(start_s, at_s, side="right")  # intervals that have begun
    last = np.maximum(place - 1, 0)
    inside = np.minimum(at_s, end_s[last]) - start_s[last]
    return np.where(place > 0, before[last] + inside, 0.0)
