"""The scoreboard: how far predictions are from measurements that others published.

    python benchmarks/scoreboard.py [--mode disagg] [--cost NAME ...] [--every N] [--results FOLDER] [--write] [--check]

Two parts. Measured runs with a row a request, under ../shared/data/truth (benchmarks/board/truth.py). And the rows of
AIConfigurator's silicon_sample.csv, of the package aiconfigurator-core (the extra `profiles`) or of --rows: each is
simulated in closed loop at its concurrency under the preset of its engine (benchmarks/board/predict.py), once by the plain
roofline, and once by `--cost measured` where there are tables of its GPU and engine. A configuration belongs wholly to
fitting or to scoring (benchmarks/board/silicon.py); nothing is fitted to scoring. --mode disagg takes the rows whose prompts
and outputs are computed apart: pools of role prefill and decode.

--results keeps each row's predictions in a folder and takes those that are there: what was cut short goes on. It is up to
you to begin another folder when the code has changed. --write puts the tables into docs/fidelity.md, the errors into
benchmarks/scoreboard.json, and those of the scoring half, row by row, into workbench/settings/accuracy.json, by which every
prediction says how sure it is (of --mode agg, and not with --at-most); --check fails when one has grown by more than a tenth
over what is there, and when fewer rows of a group are predicted. Data that is missing is named and left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.board import truth
from benchmarks.board.accuracy import keep_errors
from benchmarks.board.errors import Errors, grouped, groups_of, table, worst
from benchmarks.board.pages import between_markers
from benchmarks.board.predict import COSTS, Predicted, predict
from benchmarks.board.results import Outcome, Results
from benchmarks.board.silicon import Row, find_rows, read_rows
from workbench.settings.accuracy import RECORDED as ACCURACY

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "scoreboard.json"
PAGE = ROOT / "docs" / "fidelity.md"
ALLOWED_GROWTH = 0.10
FLOOR = 0.002
"""Errors below this are noise: growth is counted from here."""
SLICES: dict[str, tuple[int, int | None]] = {"agg": (24, None), "disagg": (6, 16)}
"""What the tests run: every so many rows of a mode, and of up to how many requests at a time."""
MODES = {"agg": "rows", "disagg": "disaggregated rows"}
"""Modes of rows, and what the tables of each are called."""


def main(
    cost: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(COSTS)}. Default: both.")] = None,
    rows: Annotated[Path | None, typer.Option(help="silicon_sample.csv. Default: the installed package's.")] = None,
    mode: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}: which rows.")] = "agg",
    every: Annotated[int, typer.Option(min=1, help="Only every Nth row.")] = 1,
    at_most: Annotated[int | None, typer.Option(min=1, help="Only rows of up to so many requests at a time.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    results: Annotated[Path | None, typer.Option(help="Keep predictions in this folder, and go on from them.")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Keep tables and errors; of a part of the rows errors alone.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="With --write and a part of the rows, tables of the page, too.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when an error has grown by a tenth.")] = False,
) -> None:
    """Score predictions against published measurements."""
    costs = cost or list(COSTS)
    if unknown := [name for name in costs if name not in COSTS]:
        print(f"error: --cost: {unknown[0]!r} is not one of {', '.join(COSTS)}", file=sys.stderr)
        raise typer.Exit(2)
    if mode not in MODES:
        print(f"error: --mode: {mode!r} is not one of {', '.join(MODES)}", file=sys.stderr)
        raise typer.Exit(2)
    path = rows or find_rows()
    scored: dict[str, tuple[list[Predicted], Counter[str]]] = {}
    try:
        for name in costs if path is not None else ():
            scored[name] = score_rows(path, every, jobs, name, results, mode, at_most)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    runs, skipped = truth.run()
    if path is None:
        skipped.append("silicon_sample.csv: not here; pip install aiconfigurator-core, or --rows FILE")
    sections = {"runs": truth.table(runs) if runs else "", MODES[mode]: "\n\n".join(row_tables(scored, every, mode))}
    for text in sections.values():
        print(text, end="\n\n")
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    found = {
        "runs": errors_of_runs(runs),
        "rows": {
            slice_of(every, name, mode, at_most): errors_of_rows(predicted, mode)
            for name, (predicted, _) in scored.items()
        },
    }
    recorded = json.loads(RECORDED.read_text())
    if write:
        keep(found, recorded)
        if mode == "agg" and at_most is None:  # by which predictions of instances that do both say how sure they are
            for line in keep_errors({name: predicted for name, (predicted, _) in scored.items()}, every, ACCURACY):
                print(line, file=sys.stderr)
        if ((every > 1 or at_most is not None) and not page) or len(scored) < len(COSTS):
            sections[MODES[mode]] = ""  # the page's tables are of all rows by both
        PAGE.write_text(between_markers(PAGE, {name: text for name, text in sections.items() if text}))
    if check:
        worse = grown(found, recorded) + lost(runs, recorded)
        for line in worse:
            print(f"worse: {line}", file=sys.stderr)
        raise typer.Exit(1 if worse else 0)


def slice_of(every: int, cost: str, mode: str = "agg", at_most: int | None = None) -> str:
    """The name under which errors of every Nth row of a mode are kept."""
    parts = [f"every {every}"]
    parts += [cost] if cost != COSTS[0] else []
    parts += [mode] if mode != "agg" else []
    parts += [f"up to {at_most} at a time"] if at_most is not None else []
    return ", ".join(parts)


def score_rows(
    path: Path,
    every: int,
    jobs: int,
    cost: str = COSTS[0],
    folder: Path | None = None,
    mode: str = "agg",
    at_most: int | None = None,
) -> tuple[list[Predicted], Counter[str]]:
    """Predictions of every Nth row of a mode, of up to so many requests at a time, and how many rows are left out by reason.

    Raises ValueError for a file in another form.
    """
    rows, left_out = read_rows(path, mode)
    rows = rows[::every]
    if at_most is not None:
        left_out[f"more than {at_most} requests at a time: not run"] += sum(row.concurrency > at_most for row in rows)
        rows = [row for row in rows if row.concurrency <= at_most]
    results = Results(folder, cost)
    missing = results.missing(rows)
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(_outcome, missing, [cost] * len(missing), chunksize=4)
        for row, outcome in zip(missing, track(found, cost, len(missing), transient=True), strict=True):
            results.add(row, outcome)
    outcomes = results.of(rows)
    left_out.update(one for one in outcomes if isinstance(one, str))
    return [one for one in outcomes if isinstance(one, Predicted)], left_out


def _outcome(row: Row, cost: str) -> Outcome:
    """A prediction, or why there is none, without what is of this row alone."""
    try:
        return predict(row, cost=cost)
    except ValueError as error:
        return f"{row.engine}: {str(error).split(';')[0]}"


def row_tables(
    scored: Mapping[str, tuple[Sequence[Predicted], Counter[str]]], every: int, mode: str = "agg"
) -> Iterable[str]:
    """What is said of the rows, as Markdown: by the roofline, and by tables beside it."""
    for predicted, left_out in scored.values():
        if not predicted:
            continue
        total = f" of {len(predicted) + sum(left_out.values()):,}" if every == 1 else ""
        yield f"{len(predicted):,}{total} rows predicted" + (f" (every {every}th)" if every > 1 else "") + "."
        break
    else:
        return
    for name, scores in (("Scoring half", True), ("Fitting half", False)):
        half = {cost: list(_half(predicted, scores)) for cost, (predicted, _) in scored.items()}
        if any(half.values()):
            yield f"**{name}**"
            for by in groups_of(mode):
                yield "\n".join(table(half, by))
        for cost, of in half.items() if scores else ():
            if of:
                yield f"The ten furthest off in the scoring half, {cost}:"
                yield "\n".join(worst(of))
    for cost, (_, left_out) in scored.items():
        if left_out:
            yield f"Left out, {cost}:"
            yield "\n".join(
                ["| reason | rows |", "|---|---|", *(f"| {why} | {n} |" for why, n in left_out.most_common())]
            )


def _half(predicted: Iterable[Predicted], scores: bool) -> Iterable[Predicted]:
    return (one for one in predicted if one.row.scores is scores)


def errors_of_runs(runs: Sequence[truth.Score]) -> dict[str, dict[str, float]]:
    """Errors of measured runs, to be kept."""
    return {run.case: {name: round(value, 5) for name, value in run.errors.items()} for run in runs}


def errors_of_rows(predicted: Sequence[Predicted], mode: str = "agg") -> dict[str, dict[str, float]]:
    """Errors of groups of rows, scoring and fitting apart, to be kept."""
    found: dict[str, dict[str, float]] = {}
    for half, scores in (("scoring", True), ("fitting", False)):
        for by, key in groups_of(mode).items():
            for name, errors in grouped(_half(predicted, scores), key).items():
                found[f"{half}: {by}: {name}"] = _numbers(errors)
    return found


def _numbers(errors: Errors) -> dict[str, float]:
    return {name: value for name, value in asdict(errors).items() if value is not None}


def grown(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """A line for every error that is more than a tenth above its recorded value, and for every group that lacks rows."""
    lines = _grown(found["runs"], recorded["runs"])
    for slice_, groups in found["rows"].items():
        before = recorded["rows"].get(slice_, {})
        lines += _grown(groups, before) + _fewer(groups, before)
    return lines


def _grown(found: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for name, errors in found.items():
        for error, value in errors.items():
            before = recorded.get(name, {}).get(error)
            if before is None or error == "rows" or error.endswith("_rows"):
                continue
            if abs(value) > max(abs(before), FLOOR) * (1 + ALLOWED_GROWTH):
                lines.append(f"{name}: {error} {value:+.2%}, recorded {before:+.2%}")
    return lines


def _fewer(found: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for name, errors in recorded.items():
        rows, before = found.get(name, {}).get("rows", 0), errors.get("rows", 0)
        if rows < before:
            lines.append(f"{name}: {rows} rows predicted, recorded {before}")
    return lines


def lost(runs: Sequence[truth.Score], recorded: dict[str, Any], data: Path = truth.DATA) -> list[str]:
    """A line for every recorded run whose data is there and that could not be scored."""
    scored = {run.case for run in runs}
    there = (case.name for case in truth.cases(data))
    return [f"{name}: could be scored before" for name in there if name in recorded["runs"] and name not in scored]


def keep(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Write the errors down; what could not be scored here stays as it was."""
    for part, values in found.items():
        recorded[part] = {**recorded[part], **values}
    RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
