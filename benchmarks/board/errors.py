"""Errors of predicted rows, by groups, as a table a person reads and as JSON that a check compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from backends.simulated.catalogue.model_specs import load_model
from benchmarks.board.predict import COSTS, Predicted, catalogue_name
from benchmarks.board.silicon import Row, Side
from workbench.settings.accuracy import layout_text

LOW_CONCURRENCY = 16
"""TTFT is scored up to here: beyond, it is queueing, which is of the load and not of the engine."""
WORST = 10


@dataclass(frozen=True)
class Errors:
    """Errors of a group, as shares of what was measured. None: nothing was measured of it."""

    rows: int
    tpot_median: float | None
    """Of the absolute errors, like ``tpot_mean``."""
    tpot_mean: float | None
    tpot_bias: float | None
    """Mean of the signed errors."""
    ttft_rows: int
    ttft_median: float | None
    ttft_mean: float | None
    ttft_bias: float | None


NONE = Errors(0, None, None, None, 0, None, None, None)


def errors_of(predicted: Sequence[Predicted]) -> Errors:
    """The errors of at least one row."""
    tpot = np.array([one.tpot_error for one in predicted])
    ttft = np.array([one.ttft_error for one in predicted if one.row.concurrency <= LOW_CONCURRENCY])
    return Errors(
        len(tpot),
        *_spread(tpot),
        len(ttft),
        *(_spread(ttft) if len(ttft) else (None, None, None)),
    )


def _spread(errors: np.ndarray) -> tuple[float, float, float]:
    size = np.abs(errors)
    return tuple(round(float(value), 5) for value in (np.median(size), size.mean(), errors.mean()))  # type: ignore[return-value]


@cache
def kind_of(model: str) -> str:
    """The kind of a row's model, by what its layers are made of. Raises ValueError for one that the catalogue has not."""
    return load_model(catalogue_name(model)).made_of


def layout_of(one: Predicted) -> str:
    """How a row's model was spread over GPUs."""
    row = one.row
    if row.prefill is None or row.decode is None:
        return _layout(row)
    return f"prefill {row.prefill.instances} x {_layout(row.prefill)}, decode {row.decode.instances} x {_layout(row.decode)}"


def _layout(of: Row | Side) -> str:
    return layout_text(of.tp, of.dp, of.ep)


GROUPS: dict[str, Callable[[Predicted], str]] = {
    "engine": lambda one: one.row.engine,
    "engine and GPU": lambda one: f"{one.row.engine}, {one.row.system}",
    "kind of model": lambda one: f"{one.row.engine}, {kind_of(one.row.model)}",
    "layout": lambda one: f"{one.row.engine}, {layout_of(one)}",
}
"""By the names of the tables."""
DISAGGREGATED = ("engine", "engine and GPU")
"""Tables of disaggregated rows: nearly all are of one model, and nearly every one has a layout of its own."""


def groups_of(mode: str) -> dict[str, Callable[[Predicted], str]]:
    """The groups of rows of a mode."""
    return {by: key for by, key in GROUPS.items() if mode == "agg" or by in DISAGGREGATED}


def grouped(predicted: Iterable[Predicted], key: Callable[[Predicted], str]) -> dict[str, Errors]:
    """Errors of each group by its name."""
    found: dict[str, list[Predicted]] = {}
    for one in predicted:
        found.setdefault(key(one), []).append(one)
    return {name: errors_of(of) for name, of in sorted(found.items())}


def table(half: Mapping[str, Sequence[Predicted]], by: str) -> list[str]:
    """A Markdown table of one grouping, with what each cost model says side by side: of rows that there are tables for,
    both."""
    lines = [
        f"| {by} | rows | TPOT median | mean | bias | with tables | roofline mean | look-ups median | mean | bias "
        f"| up to {LOW_CONCURRENCY} at a time | TTFT mean | bias | with tables | roofline mean | look-ups mean | bias |",
        "|---|" + "---|" * 16,
    ]
    roofline, measured = (half.get(cost, ()) for cost in COSTS)
    with_tables = {one.row.id for one in measured}
    every = grouped(roofline, GROUPS[by])
    both = grouped((one for one in roofline if one.row.id in with_tables), GROUPS[by])
    looked_up = grouped(measured, GROUPS[by])
    for name in sorted({*every, *looked_up}):
        all_, beside, found = (of.get(name, NONE) for of in (every, both, looked_up))
        cells = [
            f"{all_.rows}",
            *shares(all_.tpot_median, all_.tpot_mean, bias=all_.tpot_bias),
            f"{found.rows}",
            *shares(beside.tpot_mean, found.tpot_median, found.tpot_mean, bias=found.tpot_bias),
            f"{all_.ttft_rows}",
            *shares(all_.ttft_mean, bias=all_.ttft_bias),
            f"{found.ttft_rows}",
            *shares(beside.ttft_mean, found.ttft_mean, bias=found.ttft_bias),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def shares(*sizes: float | None, bias: float | None) -> list[str]:
    """Errors as a table has them; empty where nothing was predicted."""
    return ["" if size is None else f"{size:.1%}" for size in sizes] + ["" if bias is None else f"{bias:+.1%}"]


def worst(predicted: Sequence[Predicted]) -> list[str]:
    """The rows whose TPOT is furthest off."""
    lines = ["| row | measured TPOT | predicted | error |", "|---|---|---|---|"]
    for one in sorted(predicted, key=lambda one: -abs(one.tpot_error))[:WORST]:
        row = one.row
        what = (
            f"{row.engine} {row.version or '?'}, {row.model}, {row.system}, {layout_of(one)}, {row.input_tokens} in, "
            f"{row.output_tokens} out, {row.concurrency} at a time"
        )
        lines.append(f"| {what} | {row.tpot_s * 1e3:.1f} ms | {one.tpot_s * 1e3:.1f} ms | {one.tpot_error:+.0%} |")
    return lines
