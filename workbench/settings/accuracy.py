"""How far off predictions of like runs were, as the scoreboard counted (``benchmarks/scoreboard.py --write``).

A run's group is what was measured with the same engine, GPU family, kind of model, layout and cost model; where that are
fewer rows than :data:`LEAST_ROWS`, the next coarser one: without the layout, then without the kind of model, then without
the GPU family. Never another engine's, whose scheduler and host are other ones, nor another cost model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ground.json_file import read_json
from workbench.settings.loading import settings_from
from workbench.settings.parity import changed_rules
from workbench.settings.run_settings import RunSettings

RECORDED = Path(__file__).parent / "accuracy.json"
"""``every``: which rows were predicted, every Nth, by cost model; ``groups``: a :class:`Case` each, and its ``rows``. A row
is a list: a number that those share which differ in requests at a time alone, in whose order they are, and the signed errors
of TTFT (null with many requests at a time: it is the load's then), TPOT and E2E."""
LEAST_ROWS = 20
LOWEST, HIGHEST = 10, 90
"""Percentiles of a band."""
MEASURES = ("ttft", "tpot", "e2e", "throughput")
COARSER = ("layout", "model", "family")
"""What a group no longer has in common, in the order in which that is given up."""


@dataclass(frozen=True)
class Case:
    """What a prediction is of, as far as others are alike."""

    engine: str
    family: str
    """Of the GPU."""
    model: str
    """What its layers are made of."""
    layout: str
    cost: str

    def in_words(self, without: Sequence[str] = ()) -> str:
        """What rows have in common, ``without`` some of it."""
        parts = [
            self.engine + ("" if "family" in without else f" on {self.family}"),
            *("" if name in without else getattr(self, name) for name in ("model", "layout")),
            f"cost {self.cost}",
        ]
        return ", ".join(part for part in parts if part)


def engine_of(preset: str) -> str:
    """The engine of a preset, as in ``mini-sglang`` of ``mini-sglang-20fcd7f``."""
    return re.sub(r"-[\d.]+\w*$", "", preset)


def layout_text(tp: int, dp: int = 1, ep: int = 1, pp: int = 1) -> str:
    """How a model is spread over GPUs that take steps together."""
    sizes = {"dp": dp, "ep": ep, "pp": pp}
    return f"tp {tp}" + "".join(f" {name} {size}" for name, size in sizes.items() if size > 1)


def accuracy_of(
    case: Case, settings: RunSettings, loop: str, recorded: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Say for a record how far off predictions like it were: ``case``, and by measure ``bands`` of signed errors and bands
    of ``differences`` between two runs, each with what its ``group`` has in common; ``unlike``, in what the run is another
    than those that were compared; ``why``, where there are no bands.

    ``recorded`` is the content of :data:`RECORDED` if it is not to be read.
    """
    found: dict[str, Any] = {"case": asdict(case), "bands": {}, "differences": {}}
    if settings.role != "both":
        return {**found, "why": f"not compared with anything measured: instances that {settings.role} alone"}
    groups = read_recorded() if recorded is None else recorded
    nearest = list(_nearest(case, groups["groups"]))
    if not nearest:
        return {**found, "why": f"not compared with anything measured: {case.in_words(COARSER)}"}
    for measure in MEASURES:
        for without, of in nearest:
            errors = [error for rows in of for error in _errors(rows, measure)]
            if len(errors) >= LEAST_ROWS:
                low, high = np.percentile(errors, (LOWEST, HIGHEST))
                found["bands"][measure] = _band(low, high, len(errors), case.in_words(without))
                break
        for without, of in nearest:
            apart = [pair for rows in of for pair in _apart(rows, measure)]
            if len(apart) >= LEAST_ROWS:
                # Which of two is first is nobody's choice: as far below as above.
                most = np.percentile(np.abs(apart), HIGHEST - LOWEST)
                found["differences"][measure] = _band(
                    np.expm1(-most), np.expm1(most), len(apart), case.in_words(without)
                )
                break
    found["unlike"] = _unlike(settings, loop)
    if not found["bands"]:
        rows_ = max(sum(len(rows) for rows in of) for _, of in nearest)
        found["why"] = (
            f"compared with {rows_} measured rows alone, of {case.in_words(COARSER)}: too few to say how sure"
        )
    return found


@cache
def read_recorded() -> Mapping[str, Any]:
    """The errors that come with the package."""
    return read_json(RECORDED)


def _band(low: float, high: float, rows: int, group: str) -> dict[str, Any]:
    return {"low": round(float(low), 4), "high": round(float(high), 4), "rows": rows, "group": group}


def _unlike(settings: RunSettings, loop: str) -> list[str]:
    """In what a run is another than those that were compared, which were its preset's behind the engine's front end."""
    preset = settings_from(None, {"engine": settings.engine})
    unlike = changed_rules(settings)
    if preset.loop is not None and loop != preset.loop:
        unlike.append(f"loop {loop}")
    if settings.front_end == "none":
        unlike.append("front_end none")
    return unlike


def _nearest(case: Case, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, ...], list[list[Any]]]]:
    """Rows of the groups that are like a case, each group's apart, from the nearest to the coarsest, with what they no
    longer have in common; those that there are none of left out."""
    names = [field.name for field in fields(Case)]
    for given_up in range(len(COARSER) + 1):
        without = COARSER[:given_up]
        same = [name for name in names if name not in without]
        found = [group["rows"] for group in groups if all(group[name] == getattr(case, name) for name in same)]
        if found:
            yield without, found


def _errors(rows: Sequence[Sequence[Any]], measure: str) -> list[float]:
    """The signed errors of rows. As many requests at a time that each take longer are as much less of a throughput."""
    if measure == "throughput":
        return [1 / (1 + error) - 1 for error in _errors(rows, "e2e")]
    place = 1 + MEASURES.index(measure)
    return [row[place] for row in rows if row[place] is not None]


def _apart(rows: Sequence[Sequence[Any]], measure: str) -> list[float]:
    """How far apart errors are of rows that differ in nothing but requests at a time and are next to each other: logarithms
    of the ratio of one's predicted to measured to the other's."""
    loads: dict[int, list[Sequence[Any]]] = {}
    for row in rows:
        loads.setdefault(row[0], []).append(row)
    found: list[float] = []
    for of in loads.values():
        sizes = np.log1p(_errors(of, measure))
        found += np.diff(sizes).tolist()
    return found
