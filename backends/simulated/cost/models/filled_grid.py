"""Grids of measured times whose holes, edges and finer points follow the shape of an operator.

The shape is a sum of terms (a constant, bytes, FLOPs) fitted to the measurements, relative errors least. What is
interpolated is the logarithm of measured over fitted, along the logarithms of the axes: it changes slowly, and beyond the
outermost measurement of a line it stays as it is. At measured points a time is the measured one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from backends.simulated.cost.models.least_squares import relative_least_squares
from backends.simulated.cost.models.operator_tables import Grid, NotMeasured

Terms = Callable[[np.ndarray], np.ndarray]
"""Of points, float[n, axes], the terms of an operator's time, float[n, terms]."""


class Shape:
    """The fitted shape of an operator, and how measurements differ from it at the points of a grid."""

    def __init__(self, points: np.ndarray, seconds: np.ndarray, terms: Terms) -> None:
        """``seconds``, float[n], at ``points``, float[n, axes]. Raises NotMeasured for none."""
        if not len(points):
            raise NotMeasured("no measurements")
        self._terms = terms
        self._values = relative_least_squares(terms(points), seconds)
        self.axes = [np.unique(points[:, i]) for i in range(points.shape[1])]
        self.log_ratios = np.full([len(axis) for axis in self.axes], np.nan)
        """Logarithms of measured over fitted, on the grid of the axes, without holes."""
        where = tuple(np.searchsorted(axis, points[:, i]) for i, axis in enumerate(self.axes))
        self.log_ratios[where] = np.log(seconds / self.at(points))
        _fill(self.log_ratios, [_log(axis) for axis in self.axes])

    def at(self, points: np.ndarray) -> np.ndarray:
        """The fitted seconds at points."""
        fitted: np.ndarray = self._terms(points) @ self._values
        return np.maximum(fitted, np.finfo(float).tiny)

    def seconds(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Seconds at every point of a grid over other values on the same axes."""
        ratios = self.log_ratios
        for i, (ours, theirs) in enumerate(zip(self.axes, axes, strict=True)):
            ratios = _interpolated(ratios, _log(ours), _log(theirs), i)
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        fitted = self.at(points.reshape(-1, len(axes))).reshape(ratios.shape)
        found: np.ndarray = np.exp(ratios) * fitted
        return found


def filled_grid(
    points: np.ndarray, seconds: np.ndarray, terms: Terms, finer: dict[int, Sequence[float]] | None = None
) -> Grid:
    """A grid of times from points that need not fill it; ``finer``: more values on an axis, by its number."""
    shape = Shape(points, seconds, terms)
    axes = [np.union1d(axis, (finer or {}).get(i, ())) for i, axis in enumerate(shape.axes)]
    return Grid(axes, shape.seconds(axes))


def beside(have: np.ndarray, value: float) -> np.ndarray:
    """Of sorted values the next below one, itself, and the next above, as far as there are such."""
    place = int(np.searchsorted(have, value))
    at: np.ndarray = have[max(place - 1, 0) : place + 1 + (place < len(have) and have[place] == value)]
    return at


def between(axis: np.ndarray, parts: int = 2) -> np.ndarray:
    """Values that divide every interval of an axis into ``parts`` equal ones of its logarithm."""
    low, high = np.log(axis[:-1]), np.log(axis[1:])
    return np.concatenate([axis[:0], *(np.exp(low + (high - low) * i / parts) for i in range(1, parts))])


def _log(axis: np.ndarray) -> np.ndarray:
    """Logarithms; of an axis that begins with 0, of one more."""
    return np.log(axis + (axis[0] == 0))


def _interpolated(values: np.ndarray, have: np.ndarray, want: np.ndarray, axis: int) -> np.ndarray:
    """Values along an axis at other places, in straight lines; at the ends those of the ends."""
    high = np.clip(np.searchsorted(have, want), 1, max(len(have) - 1, 1))
    low = high - 1 if len(have) > 1 else np.zeros_like(high)
    high = np.minimum(high, len(have) - 1)
    gap = np.where(high > low, have[high] - have[low], 1.0)
    part = np.clip((want - have[low]) / gap, 0.0, 1.0)
    part = part.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    below = np.take(values, low, axis)
    found: np.ndarray = below + part * (np.take(values, high, axis) - below)
    return found


def _fill(full: np.ndarray, axes: Sequence[np.ndarray]) -> None:
    """Fill holes between known values, along each axis and the nearer counting more; then outward, as they are."""
    for _ in full.shape:
        total, weights = np.zeros(full.shape), np.zeros(full.shape)
        for i, axis in enumerate(axes):
            lines, sums, counts = (np.moveaxis(each, i, -1) for each in (full, total, weights))
            before, after = _known_beside(lines)
            gap = axis[np.minimum(after, len(axis) - 1)] - axis[before]
            holes = np.isnan(lines) & (before >= 0) & (after < len(axis))
            low, high = _taken(lines, before), _taken(lines, after)
            near = 1 / np.where(holes, gap, 1.0) ** 2
            part = (axis - axis[before]) / np.where(holes, gap, 1.0)
            sums[holes] += (near * (low + part * (high - low)))[holes]
            counts[holes] += near[holes]
        holes = np.isnan(full) & (weights > 0)
        if not holes.any():
            break
        full[holes] = total[holes] / weights[holes]
    for i in range(full.ndim):
        lines = np.moveaxis(full, i, -1)
        before, after = _known_beside(lines)
        outer = np.where(before >= 0, _taken(lines, before), _taken(lines, after))
        holes = np.isnan(lines)
        lines[holes] = outer[holes]


def _known_beside(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each value of each line the place of the last known one up to it, or -1, and of the next, or the length."""
    length = lines.shape[-1]
    known, places = ~np.isnan(lines), np.arange(length)
    before = np.maximum.accumulate(np.where(known, places, -1), axis=-1)
    after = np.minimum.accumulate(np.where(known, places, length)[..., ::-1], axis=-1)[..., ::-1]
    return before, after


def _taken(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The values at places along each line."""
    return np.take_along_axis(lines, places.clip(0, lines.shape[-1] - 1), axis=-1)
