"""Measured operator times of one model on one GPU, and how they are looked up between the measured points.

Every table is brought into a form in which a look-up is a few list accesses: a curve becomes a list with an entry for
every token count, a grid keeps its axes and a flat list. Nothing here knows where the numbers came from; the
readers of ``cost/tables`` do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from backends.checkpoint.layer_kinds import Layer, Mixer
from ground.errors import InputError

TILE_TOKENS = 16
"""Matrix kernels compute whole tiles of rows, so their time is a staircase. Where points are measured at least this
densely, a count between two takes the time of the upper one; where they are sparser the staircase is not visible and
the time is interpolated."""


class ProfileError(InputError):
    """A profile that cannot be read or does not fit the run, in one line that names the file and the field."""


class NotMeasured(ProfileError):
    """A shape, precision or size that a profile has no measurement of."""


class Curve:
    """Seconds as a function of a count (tokens, sequences)."""

    def __init__(
        self, counts: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray, *, staircase: bool = False
    ) -> None:
        order = np.argsort(np.asarray(counts))
        self.counts = np.asarray(counts, np.float64)[order]
        self.seconds = np.asarray(seconds, np.float64)[order]
        self.most = int(self.counts[-1])
        whole = np.arange(self.most + 1, dtype=np.float64)
        values = np.interp(whole, self.counts, self.seconds)
        if staircase:
            upper = np.searchsorted(self.counts, whole)
            gap = np.diff(self.counts, prepend=self.counts[0])[upper]
            values = np.where(gap <= TILE_TOKENS, self.seconds[upper], values)
        self._values: np.ndarray = values

    @cached_property
    def table(self) -> list[float]:
        """Seconds for every count up to ``most``: a list, whose elements are quickly had. Few curves are ever looked up."""
        found: list[float] = self._values.tolist()
        return found

    def __add__(self, other: Curve) -> Curve:
        most = min(self.most, other.most)
        total = Curve.__new__(Curve)
        total.counts = np.union1d(self.counts, other.counts)
        total.counts = total.counts[total.counts <= most]
        total.most = most
        total._values = self._values[: most + 1] + other._values[: most + 1]
        total.seconds = total._values[total.counts.astype(int)]
        return total

    def times(self, factor: float) -> Curve:
        """Scale the curve to ``factor`` times the seconds."""
        scaled = Curve.__new__(Curve)
        scaled.counts, scaled.seconds, scaled.most = self.counts, self.seconds * factor, self.most
        scaled._values = self._values * factor
        return scaled

    def at(self, count: float) -> float:
        """Look up the seconds for a count within the range; clamped to its ends outside."""
        if count <= 0:
            return self.table[0]
        whole = int(count)
        if whole >= self.most:
            return self.table[self.most]
        part = count - whole
        low = self.table[whole]
        return low + part * (self.table[whole + 1] - low) if part else low


class Grid:
    """Values on a regular grid, interpolated linearly along every axis and clamped at its ends.

    Linear, not logarithmic: the times stored here are sums of terms that are each linear in every axis (tokens read,
    pairs attended, a constant), and multilinear interpolation reproduces such a sum exactly.
    """

    def __init__(self, axes: Sequence[Sequence[float] | np.ndarray], values: np.ndarray) -> None:
        self.axes = [list(map(float, axis)) for axis in axes]
        assert values.shape == tuple(len(axis) for axis in self.axes)
        self.ends = [axis[-1] for axis in self.axes]
        """Ends of the measured range, by axis."""
        self.values = values
        self._parts: dict[tuple[int, ...], Grid] = {}
        self._flat: list[float] = np.ascontiguousarray(values, np.float64).reshape(-1).tolist()
        strides, step = [], 1
        for length in reversed(values.shape):
            strides.append(step)
            step *= length
        self._strides = strides[::-1]

    def near(self, *first: float) -> Grid:
        """The part of the grid at the measured points nearest to values on its first axes: a grid over the other
        axes."""
        at = tuple(
            min(range(len(axis)), key=lambda i: abs(axis[i] - x)) for axis, x in zip(self.axes, first, strict=False)
        )
        part = self._parts.get(at)
        if part is None:
            part = self._parts[at] = Grid(self.axes[len(at) :], self.values[at])
        return part

    def at(self, *where: float) -> float:
        """Look up the value at a point."""
        base = 0
        between = []
        for axis, stride, x in zip(self.axes, self._strides, where):  # noqa: B905, on every step: strict costs
            if x <= axis[0]:
                continue
            if x >= axis[-1]:
                base += (len(axis) - 1) * stride
                continue
            low = bisect_right(axis, x) - 1
            base += low * stride
            left = axis[low]
            if x != left:
                between.append((stride, (x - left) / (axis[low + 1] - left)))
        flat = self._flat
        if not between:
            return flat[base]
        # Halve the corners axis by axis: the pairs along the first are read, the rest is arithmetic.
        offsets = [base]
        for stride, _ in between[1:]:
            offsets += [offset + stride for offset in offsets]
        stride, part = between[0]
        values = [flat[at] + part * (flat[at + stride] - flat[at]) for at in offsets]
        for _, part in reversed(between[1:]):
            half = len(values) // 2
            values = [low + part * (high - low) for low, high in zip(values[:half], values[half:])]  # noqa: B905
        return values[0]


def grid_from_points(points: np.ndarray, values: np.ndarray, order: Sequence[int]) -> Grid:
    """A regular grid over all coordinates that occur, from points that need not fill it.

    Holes are filled by linear interpolation between measured neighbours, along the axes in ``order`` (the axis along
    which the quantity is smoothest first); what lies beyond the measured points of a line takes the trend of its last
    two (never below the last one).
    """
    axes = [np.unique(points[:, i]) for i in range(points.shape[1])]
    full = np.full([len(axis) for axis in axes], np.nan)
    index = tuple(np.searchsorted(axis, points[:, i]) for i, axis in enumerate(axes))
    full[index] = values
    for _ in range(len(axes)):
        for axis in order:
            _fill_between(full, axes[axis], axis)
        if not np.isnan(full).any():
            break
    for axis in order:
        _fill_ends(full, axes[axis], axis)
    if np.isnan(full).any():
        raise InputError("too few points for a grid")
    return Grid(axes, full)


def _fill_between(full: np.ndarray, coordinates: np.ndarray, axis: int) -> None:
    lines = np.moveaxis(full, axis, -1)
    for at in np.ndindex(*lines.shape[:-1]):
        line = lines[at]
        known = ~np.isnan(line)
        if known.all() or known.sum() < 2:
            continue
        first, last = known.nonzero()[0][[0, -1]]
        span = slice(first, last + 1)
        line[span] = np.interp(coordinates[span], coordinates[known], line[known])


def _fill_ends(full: np.ndarray, coordinates: np.ndarray, axis: int) -> None:
    lines = np.moveaxis(full, axis, -1)
    for at in np.ndindex(*lines.shape[:-1]):
        line = lines[at]
        known = (~np.isnan(line)).nonzero()[0]
        if len(known) == len(line) or not len(known):
            continue
        first, last = known[0], known[-1]
        line[:first] = line[first]
        if last + 1 < len(line):
            slope = 0.0
            if len(known) > 1:
                before = known[-2]
                slope = max((line[last] - line[before]) / (coordinates[last] - coordinates[before]), 0.0)
            line[last + 1 :] = line[last] + slope * (coordinates[last + 1 :] - coordinates[last])


@dataclass(frozen=True)
class Provenance:
    """The origin of a profile: file, GPU, model, engine."""

    path: Path
    format: str
    gpu: str
    """Name of the GPU in the profile."""
    dtype: str
    model: str | None = None
    """None: operators of any shape."""
    engine: str = ""
    measured: str = ""
    """Date of the measurement, as the profile says it."""
    tp: int = 1
    notes: tuple[str, ...] = ()


@dataclass
class AttentionTable:
    """Attention of one layer, in seconds."""

    decode: Grid
    """(requests, mean context in tokens): decodes alone."""
    mixed: Grid
    """(prompt tokens, cached tokens before them, decodes, their mean context): one launch for all."""
    uneven: Grid | None = None
    """(prompt tokens, cached tokens, decodes, unevenness, mean context): by which share it is longer when the decodes
    are of unequal length. Unevenness is (longest - mean) / longest."""
    uneven_decode: Grid | None = None
    """(decodes, unevenness, mean context): by which share decodes alone take longer when they are of unequal length."""
    by_keys: bool = False
    """The second axis of ``mixed`` is how many keys a prompt token sees on average instead: time is linear in it, for one
    prompt and for several, so that measurements of both can be in one table."""


class MixerTimes(Protocol):
    """Times of a layer of one kind of attention or recurrence."""

    @property
    def grids(self) -> Mapping[str, Grid]:
        """What was measured, of ``prompts`` and of ``decodes``."""
        ...

    def tell(self, beyond: Callable[[str, int, int], None]) -> None:
        """Have ``beyond`` told what is beyond the measured range: what it is, its value, the end of the range."""
        ...

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        ...

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        ...


@dataclass
class OperatorTables:
    """Everything measured about one model on one GPU at one tensor-parallel size."""

    provenance: Provenance
    layer: dict[str, Curve]
    """Seconds a layer by operator, by tokens; attention and routed experts aside. An operator that runs twice counts
    twice."""
    once: dict[str, Curve]
    """Seconds a step by operator, by tokens."""
    head: dict[str, Curve]
    """Seconds a step by operator, by sampled sequences."""
    attention: AttentionTable | None
    """None: as ``mixers`` say."""
    experts: Grid | None = None
    """(tokens, distinct experts they use): the routed experts of a layer on one GPU; None where there are none, or by the
    roofline, which has router and shared experts with them."""
    all_reduce: Grid | None = None
    """(bytes,): an all-reduce over the tensor-parallel group."""
    kernels_per_layer: int = 0
    """Kernels that a layer launches, where the tables hold the kernels' own times: what lies between two of them is
    then to be added to steps that launch them one by one."""
    layers_timed: bool = False
    """They are of the layers of a model as it ran, with the small kernels around its operators, not of operators alone."""
    experts_over: int = 1
    """Over how many GPUs the experts were divided when they were measured."""
    kinds: Mapping[Layer, Mapping[str, Curve]] | None = None
    """In place of ``layer``, for models with layers of several kinds: the same of each kind."""
    mixers: Mapping[Mixer, MixerTimes] = field(default_factory=dict)
    """In place of ``attention``, for models with layers of several kinds: the times of each kind of attention and
    recurrence; those that are not here are the roofline's."""
    gather: Grid | None = None
    """(bytes,): an all-gather of tokens to the experts of all instances; None: by the roofline."""
    scatter: Grid | None = None
    """(bytes,): a reduce-scatter of what these experts give; None: by the roofline."""
    notes: list[str] = field(default_factory=list)
    """Sentences about where the times are from, for the notes of a run."""
    missing: list[str] = field(default_factory=list)
    """Operators that were not measured, and what stands in for them."""
