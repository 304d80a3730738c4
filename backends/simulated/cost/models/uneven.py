"""Decodes of unequal length: how much longer attention takes than at their mean length.

A GPU runs one block of work for every request and head. Where there are many more blocks than places, lengths average
out and the mean decides; where there are few, or where long ones come last, the longest ones do. Profiles measure that
with batches of two lengths. What is kept of a measurement is the share by which it exceeds the look-up at its mean
length, as a function of how uneven it is: (longest - mean) / longest, which is 0 for equal lengths and approaches 1 for
one long among many short.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from backends.simulated.cost.models.operator_tables import Grid

UNEVENNESS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def uneven_grid(rows: dict[str, np.ndarray], equal_s: Callable[..., float]) -> tuple[Grid | None, Grid | None]:
    """(for decodes alone, for decodes beside a prefill), from measured batches of two lengths.

    ``rows`` has the columns ``prefill``, ``cached``, ``decodes``, ``longest``, ``mean`` (tokens) and ``seconds``;
    ``equal_s(prefill, cached, decodes, mean)`` is the look-up for equal lengths.
    """
    equal = np.array(
        [equal_s(*at) for at in zip(*(rows[n] for n in ("prefill", "cached", "decodes", "mean")), strict=True)]
    )
    excess = rows["seconds"] / equal - 1
    unevenness = (rows["longest"] - rows["mean"]) / rows["longest"]
    alone = rows["prefill"] == 0
    pure = mixed = None
    if alone.any():
        decodes = np.unique(rows["decodes"][alone])
        means = _knots(rows["mean"][alone])
        values = np.stack(
            [_plane(unevenness, rows["mean"], excess, alone & (rows["decodes"] == n), means) for n in decodes]
        )
        pure = Grid((decodes, UNEVENNESS, means), values)
    beside = ~alone
    if beside.any():
        chunks, cached = np.unique(rows["prefill"][beside]), np.unique(rows["cached"][beside])
        decodes = np.unique(rows["decodes"][beside])
        means = _knots(rows["mean"][beside])
        values = np.zeros((len(chunks), len(cached), len(decodes), len(UNEVENNESS), len(means)))
        for c, chunk in enumerate(chunks):
            for n, count in enumerate(decodes):
                line = beside & (rows["prefill"] == chunk) & (rows["decodes"] == count)
                there = [k for k, prefix in enumerate(cached) if (line & (rows["cached"] == prefix)).any()]
                for k in there:
                    of = line & (rows["cached"] == cached[k])
                    values[c, k, n] = _plane(unevenness, rows["mean"], excess, of, means)
                for k in range(len(cached)):
                    if k not in there and there:
                        values[c, k, n] = values[c, min(there, key=lambda other: abs(other - k)), n]
        mixed = Grid((chunks, cached, decodes, UNEVENNESS, means), values)
    return pure, mixed


def _knots(means: np.ndarray) -> np.ndarray:
    """Mean lengths in powers of two over the measured range."""
    low, high = np.floor(np.log2(means.min())), np.ceil(np.log2(means.max()))
    return 2.0 ** np.arange(low, high + 1)


def _plane(
    unevenness: np.ndarray, mean: np.ndarray, excess: np.ndarray, of: np.ndarray, means: np.ndarray
) -> np.ndarray:
    """excess[unevenness, mean] on the knots: along the mean (in its logarithm) for every measured unevenness, then
    across."""
    plane = np.zeros((len(UNEVENNESS), len(means)))
    if not of.any():
        return plane
    levels = np.unique(unevenness[of].round(2))
    lines = []
    for level in levels:
        at = of & (unevenness.round(2) == level)
        x, place = np.unique(mean[at], return_inverse=True)
        y = np.bincount(place, excess[at]) / np.bincount(place)
        lines.append(np.interp(np.log(means), np.log(x), y))
    known = np.concatenate(([0.0], levels))
    stacked = np.stack([np.zeros(len(means)), *lines])
    for m in range(len(means)):
        plane[:, m] = np.interp(UNEVENNESS, known, stacked[:, m])
    return plane
