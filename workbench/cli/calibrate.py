"""``workbench calibrate``: cost models from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def calibrate(
    record: Annotated[Path, typer.Option("--from", help="Run record whose iterations to fit.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File to write, for --cost fitted:FILE.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Fit the coefficients of a step-time model and of the CPU phases to an existing run record."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _calibrate(record, out, force, as_json)


def _calibrate(folder: Path, out: Path, force: bool, as_json: bool) -> None:
    import json

    from backends.simulated.cost.fitted import TERMS
    from reports.record import RecordError, read_record
    from workbench.run.calibrate import fit_record

    if out.exists() and not force:
        raise RecordError(f"{out}: exists; --force replaces it")
    found = fit_record(read_record(folder), folder, out)
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for number, stage in enumerate(found["stages"]):
        table = Table(box=None, pad_edge=False, title=f"stage {number}" if len(found["stages"]) > 1 else None)
        table.add_column("step time")
        table.add_column("us", justify="right")
        for term in TERMS:
            table.add_row(term.removesuffix("_s").replace("_", " "), _us(stage[term]))
        table.add_row("knee, tokens", str(stage["knee_tokens"]))
        console.print(table)
        console.print(
            f"{stage['steps']:,} steps: off by {stage['mean_error']:.1%} on average, {stage['total_error']:+.1%} in total"
        )
    _phases(console, found)
    console.print(f"simulate with: --cost fitted:{out}", soft_wrap=True)


def _phases(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("CPU phase")
    table.add_column("us", justify="right")
    for name, value in found["host"].items():
        table.add_row(name.removesuffix("_s").replace("_", " "), _us(value))
    console.print(table)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.4g}"
