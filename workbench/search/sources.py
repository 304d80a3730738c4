"""Sources of a sweep's points: a list, or Optuna, which learns from the runs before."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from workbench.search.objectives import Objective
from workbench.search.point import FINISHED
from workbench.search.results import Row, key_of
from workbench.search.space import Dimension, Point, SpaceError, grid_points, grid_size, random_points

SEARCHES = ("grid", "random", "optuna")
DEFAULT_POINTS = 32
"""Of a random or Optuna search."""
ASKS = 50
"""Proposals of Optuna in a row that were run before, after which a point is drawn at random instead."""


class Source(Protocol):
    """Hands out points that were not run before."""

    total: int

    def next(self) -> tuple[int, Point] | None:
        """(number, point), or None when there are no more."""
        ...

    def tell(self, point: Point, row: Row) -> None:
        """Take in what became of a point that was handed out."""
        ...


def open_source(
    search: str,
    space: list[Dimension],
    points: int | None,
    seed: int,
    objectives: list[Objective],
    done: list[tuple[Point, Row]],
) -> Source:
    """The source of a search that has `done` so much already. Raises SpaceError."""
    if search not in SEARCHES:
        raise SpaceError(f"search: {search!r} is not one of {', '.join(SEARCHES)}")
    if points is not None and points < 1:
        raise SpaceError(f"points: {points} is less than 1")
    if search == "optuna":
        return OptunaSource(space, points or DEFAULT_POINTS, seed, objectives, done)
    if search == "random":
        return Listed(random_points(space, points or DEFAULT_POINTS, seed), done)
    size = grid_size(space)
    if points is not None and size > points:
        raise SpaceError(f"points: the grid has {size}, more than {points}; --search random draws some of them")
    return Listed(list(grid_points(space)), done)


class Listed:
    """Points that are known beforehand; a point's number is its place."""

    def __init__(self, points: list[Point], done: list[tuple[Point, Row]]) -> None:
        before = {key_of(point) for point, _ in done}
        self.total = len(points)
        self.points = points
        self._left = [(number, point) for number, point in enumerate(points) if key_of(point) not in before]
        self._left.reverse()

    def next(self) -> tuple[int, Point] | None:
        return self._left.pop() if self._left else None

    def tell(self, point: Point, row: Row) -> None:
        """A list learns nothing."""


class OptunaSource:
    """Optuna's TPE over the objectives. Every run that is done, of this sweep or of the part before a resume, is told."""

    def __init__(
        self, space: list[Dimension], points: int, seed: int, objectives: list[Objective], done: list[tuple[Point, Row]]
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise SpaceError("search: optuna is not installed; pip install 'llm-workbench[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._space, self._objectives = space, objectives
        self._distributions = {dimension.name: _distribution(optuna, dimension) for dimension in space}
        self._study = optuna.create_study(
            directions=["maximize" if objective.higher else "minimize" for objective in objectives],
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        )
        self._rng = np.random.default_rng(seed)
        self._size = math.prod(dimension.size for dimension in space)
        self.total = int(min(points, self._size))
        self._asked: dict[str, Any] = {}
        self._rows: dict[str, Row] = {}
        self._next = 0
        for point, row in done:
            trial = optuna.trial.create_trial(params=point, distributions=self._distributions, **self._verdict(row))
            self._study.add_trial(trial)
            self._rows[key_of(point)] = row
            self._next = max(self._next, row["point"] + 1)

    def next(self) -> tuple[int, Point] | None:
        if len(self._asked) >= self.total - self._told_before():
            return None
        trial, point = self._new()
        if point is None:
            return None
        self._asked[key_of(point)] = trial
        number, self._next = self._next, self._next + 1
        return number, point

    def tell(self, point: Point, row: Row) -> None:
        key = key_of(point)
        self._rows[key] = row
        self._say(self._asked[key], row)

    def _told_before(self) -> int:
        return sum(key not in self._asked for key in self._rows)

    def _new(self) -> tuple[Any, Point | None]:
        """A proposal that is none of the points before, if there is one left."""
        for _ in range(ASKS):
            trial = self._study.ask(self._distributions)
            point = {d.name: _as_drawn(d, trial.params[d.name]) for d in self._space}
            key = key_of(point)
            if key not in self._asked and key not in self._rows:
                return trial, point
            if key in self._rows:
                self._say(trial, self._rows[key])
            else:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        for _ in range(1000):
            point = {dimension.name: dimension.draw(self._rng) for dimension in self._space}
            if key_of(point) not in self._asked and key_of(point) not in self._rows:
                self._study.enqueue_trial(point)
                return self._study.ask(self._distributions), point
        return None, None

    def _say(self, trial: Any, row: Row) -> None:
        verdict = self._verdict(row)
        if "values" in verdict:
            self._study.tell(trial, verdict["values"])
        else:
            self._study.tell(trial, state=verdict["state"])

    def _verdict(self, row: Row) -> dict[str, Any]:
        values = [row[objective.metric] for objective in self._objectives]
        if row["status"] != FINISHED or any(value is None for value in values):
            return {"state": self._optuna.trial.TrialState.FAIL}
        return {"values": [float(value) for value in values]}


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if dimension.values:
        return kinds.CategoricalDistribution(dimension.values)
    if dimension.whole:
        return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _as_drawn(dimension: Dimension, value: Any) -> Any:
    # As random points are: short enough to be typed again, and the same after a trip through results.csv.
    return value if dimension.values or dimension.whole else float(f"{value:.6g}")
