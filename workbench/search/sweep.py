"""A sweep: many points of a space, run side by side, every one kept as soon as it is done."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from reports.metrics.sweep_metrics import compared
from workbench.cluster.interrupts import Interrupted, noted_interrupts
from workbench.search.executor import open_executor
from workbench.search.objectives import Objective
from workbench.search.point import FAILED, INVALID, TIMED_OUT, Outcome, Shared, run_point
from workbench.search.results import Results, Row
from workbench.search.sources import Source
from workbench.search.space import Dimension, Point, SpaceError
from workbench.settings.idle import idle_in

TICK_S = 0.25
"""How often progress is shown while nothing finishes."""


@dataclass(frozen=True)
class State:
    """Progress of a sweep."""

    total: int
    done: int
    running: int
    by_status: dict[str, int]


Progress = Callable[[State], None]


def manifest_of(
    shared: Shared, space: list[Dimension], search: str, points: int | None, objectives: list[Objective]
) -> dict[str, Any]:
    """Everything that decides what the results of a sweep are; a resumed one must have the same."""
    info = shared.trace.info
    return {
        "trace": {
            "name": info.name,
            "path": info.path,
            "sha256": shared.trace_sha256,
            "notes": list(info.notes),
            **({"flags": shared.trace_flags} if shared.trace_flags else {}),
        },
        "settings": shared.base.given(),
        "space": [dimension.to_dict() for dimension in space],
        "search": search,
        "points": points,
        "objective": [f"{'max' if o.higher else 'min'}:{o.metric}" for o in objectives],
        "prices": dict(shared.prices.per_gpu_hour) if shared.prices is not None else None,
        "currency": shared.prices.currency if shared.prices is not None else "",
        "records": shared.records is not None,
        "version": importlib.metadata.version("llm-workbench"),
        "command": shared.command,
    }


def check_effects(shared: Shared, points: list[Point]) -> None:
    """Refuse flags and varied settings that have no effect at any of the points. Raises SpaceError."""
    runs = []
    for point in points:
        with contextlib.suppress(ValueError):  # what is wrong with a point is said of that point
            runs.append(shared.base.settings(point))
    given = [name for name, value in shared.base.flags.items() if value is not None]
    never, _ = idle_in(runs, dict.fromkeys([*given, *(name for point in points for name in point)]))
    for name, missing in never.items():
        raise SpaceError(f"{name}: has no effect at any point: it needs {missing}")


def check_any(shared: Shared, points: list[Point]) -> None:
    """Check that a point can run: where none can, it is no search but a mistake. Raises SpaceError."""
    check_effects(shared, points)
    reason = ""
    for point in points:
        try:
            shared.check(point)
            return
        except ValueError as error:
            reason = reason or str(error)
    raise SpaceError(reason if len(points) == 1 else f"none of the {len(points)} points can run: {reason}")


def run_sweep(
    shared: Shared,
    source: Source,
    results: Results,
    *,
    executor: str = "local",
    jobs: int | None = None,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> bool:
    """Run what is left of a sweep into `results`. Returns False when interrupted from the keyboard; what was finished by
    then is kept.

    Raises ExecutorError.
    """
    work = partial(run_point, shared)
    points: dict[int, Point] = {}

    def keep(number: int, outcome: Outcome) -> None:
        point = points.pop(number)
        source.tell(point, results.add(number, point, outcome))

    with noted_interrupts() as interrupt, open_executor(executor, work, jobs, time_limit_s) as running:
        try:
            exhausted = False
            while not exhausted or running.running:
                interrupt.check()
                while running.free and not exhausted:
                    following = source.next()
                    if following is None:
                        exhausted = True
                        break
                    number, point = following
                    points[number] = point
                    try:
                        shared.check(point)
                    except ValueError as error:
                        keep(number, Outcome(INVALID, str(error)))
                    else:
                        running.start(number, (number, point))
                for done in running.wait(TICK_S):
                    assert isinstance(done.key, int)
                    if done.timed_out:
                        keep(done.key, Outcome(TIMED_OUT, f"ran for more than {time_limit_s:g} s"))
                    elif done.fault is not None:
                        keep(done.key, Outcome(FAILED, done.fault))
                    else:
                        keep(done.key, done.result)
                if progress is not None:
                    by_status = Counter(str(row["status"]) for row in results.rows)
                    progress(State(source.total, len(results.rows), running.running, dict(by_status)))
        except Interrupted:
            return False
    results.sort()
    return True


def best_rows(rows: list[Row], objective: Objective) -> list[Row]:
    """The compared rows that have the metric, the best first."""
    having = [row for row in compared(rows) if row[objective.metric] is not None]
    return sorted(having, key=lambda row: (-1 if objective.higher else 1) * row[objective.metric])


def pareto_front(rows: list[Row], objectives: list[Objective]) -> list[Row]:
    """Compared rows that no other row beats in one objective without losing in another."""

    def losses(row: Row) -> tuple[float, ...]:
        return tuple((-1 if o.higher else 1) * row[o.metric] for o in objectives)

    having = [row for row in compared(rows) if all(row[o.metric] is not None for o in objectives)]
    front: list[Row] = []
    scored: list[tuple[Any, Row]] = sorted(((losses(row), row) for row in having), key=lambda pair: pair[0])
    for mine, row in scored:
        dominated = any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other, _ in scored)
        if not dominated:
            front.append(row)
    return front
