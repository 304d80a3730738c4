"""Objectives of a sweep."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from reports.metrics.labels import Better
from reports.metrics.sweep_metrics import SWEEP_METRICS
from workbench.search.space import SpaceError

DEFAULT_OBJECTIVES = "output_throughput_per_gpu,ttft_p99_s"


@dataclass(frozen=True)
class Objective:
    """A metric of the results and whether more of it is better."""

    metric: str
    higher: bool

    def better(self, one: float, other: float) -> bool:
        return one > other if self.higher else one < other


def parse_objectives(text: str) -> list[Objective]:
    """`metric,metric`, each with `max:` or `min:` before it where it is not plain which is better.

    Raises SpaceError, in one line with the nearest names, for a metric that does not exist.
    """
    objectives = []
    for part in text.split(","):
        way, colon, name = part.strip().rpartition(":")
        metric = SWEEP_METRICS.get(name)
        if metric is None:
            near = difflib.get_close_matches(name, SWEEP_METRICS, 3, 0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise SpaceError(f"objective: no metric {name!r}{hint}")
        if colon and way not in ("max", "min"):
            raise SpaceError(f"objective: {way!r} is not one of max, min")
        if not colon and metric.better is Better.NEITHER:
            raise SpaceError(f"objective: {name}: is more of it better? Write max:{name} or min:{name}")
        objectives.append(Objective(name, way == "max" if colon else metric.better is Better.HIGHER))
    return objectives
