"""``workbench profile``: what a folder of measured operator times covers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(no_args_is_help=True, help="Look at profiles of measured operator times.")


@app.callback()
def _group() -> None:
    """Keep `profile` a group of commands."""


@app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="Profile folder, table file, or fitted costs.", show_default=False)],
    model: Annotated[
        Optional[str], typer.Option("--model", help="For tables of operators of any shape: the model to look at.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print where a profile comes from and what it covers."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from backends.simulated.cost.tables.profiles import describe
        from ground.json_file import json_text

        found = describe(path, model)
        if as_json:
            print(json_text(found))
        else:
            _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, value in found["provenance"].items():
        if value:
            console.print(f"{name:10}{value}", highlight=False, soft_wrap=True)
    for part in found["sizes"]:
        table = Table(box=None, pad_edge=False, header_style="bold", title=part["title"], title_justify="left")
        for title in ("operator", "by", "measured range", "points"):
            table.add_column(title, justify="right" if title == "points" else "left")
        for row in part["tables"]:
            table.add_row(row["operator"], row["by"], row["range"], f"{row['points']:,}")
        console.print(table)
        for line in part["missing"]:
            console.print(f"missing: {line}", highlight=False)
