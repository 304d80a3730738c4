"""The progress of measurements on a terminal, and their end by Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

Update = Callable[[int, int, str], None]
"""Is told what is done, of how many, and what is measured next."""


@contextmanager
def measuring(quiet: bool, first: str, kept: str) -> Iterator[Update]:
    """Show a bar while something is measured, on a terminal and unless ``quiet``. ``first`` is what is done before anything
    is measured; ``kept`` says what is left of an interrupted measurement, which ends the command with 130."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    try:
        with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
            task = bar.add_task(first, total=None)
            yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)
    except KeyboardInterrupt:
        print(f"interrupted: {kept}", file=sys.stderr)
        raise typer.Exit(130) from None
