"""The command line, in this process: there are many golden commands, and starting Python takes longer than most."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from typer.testing import CliRunner


def workbench(command: str, folder: Path) -> None:
    """Run ``command`` as a user in ``folder`` would. Raises AssertionError with its output if it fails."""
    from workbench.cli.app import app

    first, *words = shlex.split(command)
    assert first == "workbench", command
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{command}\n{done.output}{done.exception or ''}"
