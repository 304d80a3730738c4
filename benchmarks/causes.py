"""Why predictions of the published rows are off: the scoring half again, with one cause taken away at a time.

    python benchmarks/causes.py [--every N] [--jobs N] [--results FOLDER] [--write]

Rows of H100, H200 and B200 under vLLM and SGLang (benchmarks/board/causes.py). --results keeps predictions in a folder and
goes on from them. --write puts the tables into docs/fidelity.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.board.causes import AS_RAN, CAUSES, ENGINES, fewer_ran, is_asked, least_tpot_s, outcome
from benchmarks.board.errors import LOW_CONCURRENCY, errors_of, shares
from benchmarks.board.pages import between_markers
from benchmarks.board.predict import Predicted
from benchmarks.board.results import Results
from benchmarks.board.silicon import find_rows, read_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"
TABLES = "look-ups"
"""The cause that the others are taken away from."""


def main(
    every: Annotated[int, typer.Option(min=1, help="Only every Nth row.")] = 6,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    results: Annotated[Path | None, typer.Option(help="Keep predictions in this folder, and go on from them.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the tables into docs/fidelity.md.")] = False,
) -> None:
    """Take causes of errors away, one at a time."""
    path = find_rows()
    if path is None:
        print("error: silicon_sample.csv: not here; pip install aiconfigurator-core", file=sys.stderr)
        raise typer.Exit(2)
    rows = [row for row in read_rows(path)[0] if is_asked(row)][::every]
    fewer = {row.id for row in rows if fewer_ran(row)}
    found: dict[str, list[Predicted]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        for cause in CAUSES:
            kept = Results(results, f"cause {list(CAUSES).index(cause)}")
            asked = [row for row in rows if row.id in fewer] if cause == AS_RAN else rows
            missing = kept.missing(asked)
            outcomes = pool.map(outcome, missing, [cause] * len(missing), chunksize=4)
            for row, one in zip(missing, track(outcomes, cause, len(missing), transient=True), strict=True):
                kept.add(row, one)
            found[cause] = [one for one in kept.of(asked) if isinstance(one, Predicted)]
    text = "\n\n".join(tables(found, fewer, every))
    print(text)
    if write:
        PAGE.write_text(between_markers(PAGE, {"causes": text}))


def tables(found: Mapping[str, Sequence[Predicted]], fewer: set[str], every: int) -> Iterable[str]:
    """What is said of each cause, as Markdown."""
    looked_up = {one.row.id: one for one in found[TABLES]}
    of = "" if every == 1 else f" (every {every}th)"
    yield (
        f"Scoring half, H100, H200 and B200, rows with tables{of}. Of every line the same rows, unless it says which. "
        f"TTFT at up to {LOW_CONCURRENCY} at a time."
    )
    yield "\n".join(_lines(found, looked_up, fewer))
    shorter = [one for one in looked_up.values() if one.row.tpot_s < least_tpot_s(one.row)]
    yield (
        f"{len(shorter)} of {len(looked_up)} rows are faster than their step is at the full rates of the GPU's datasheet; "
        f"in {len(fewer)} fewer requests ran than were asked for."
    )


def _lines(
    found: Mapping[str, Sequence[Predicted]], looked_up: Mapping[str, Predicted], fewer: set[str]
) -> Iterable[str]:
    names = [name for engine in ENGINES for name in (f"{engine} rows", "TPOT mean", "bias", "TTFT mean", "bias")]
    yield f"| | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    groups = {cause: list(predicted) for cause, predicted in found.items() if cause != AS_RAN}
    groups["look-ups, rows in which as many ran as were asked for"] = [
        one for one in found[TABLES] if one.row.id not in fewer
    ]
    groups["look-ups, rows in which fewer ran"] = [one for one in found[TABLES] if one.row.id in fewer]
    groups[AS_RAN] = list(found[AS_RAN])
    groups["look-ups, rows with a table for every operator"] = [one for one in found[TABLES] if not one.lacking]
    groups["look-ups, one GPU"] = [one for one in found[TABLES] if one.row.tp * one.row.dp == 1]
    groups["look-ups, several GPUs"] = [one for one in found[TABLES] if one.row.tp * one.row.dp > 1]
    for limit in (4, 16, 64, None):
        last = next((each for each in (16, 4) if limit is not None and each < limit), 64 if limit is None else 0)
        what = f"more than {last}" if limit is None else f"up to {limit}" if not last else f"{last + 1} to {limit}"
        groups[f"look-ups, {what} at a time"] = [
            one for one in found[TABLES] if last < one.row.concurrency <= (limit or one.row.concurrency)
        ]
    for name, predicted in groups.items():
        cells = []
        for engine in ENGINES:
            rows = [one for one in predicted if one.row.engine == engine and one.row.id in looked_up]
            if not rows:
                cells += ["0", "", "", "", ""]
                continue
            errors = errors_of(rows)
            cells += [f"{errors.rows}", *shares(errors.tpot_mean, bias=errors.tpot_bias)]
            cells += shares(errors.ttft_mean, bias=errors.ttft_bias)
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
