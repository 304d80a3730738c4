"""The flags that several commands share: one vocabulary, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from workbench.scheduler.settings import HARDWARE, RUN


def option(*names: str, help: str, panel: str) -> Any:
    """A flag in a panel of the help page; defaults are said in its text, for they may come from a file."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


Config = Annotated[Optional[Path], option("--config", help="TOML file of settings; flags win.", panel=RUN)]
Like = Annotated[
    Optional[Path],
    option(
        "--like",
        help="Run record, or output folder with one, whose settings to take; --config and flags win.",
        panel=RUN,
    ),
]
Out = Annotated[
    Optional[Path], option("--out", help="Output folder. Default: runs/<trace>, numbered if taken.", panel=RUN)
]
Force = Annotated[bool, option("--force", help="Replace an earlier run in the output folder.", panel=RUN)]
AsJson = Annotated[bool, option("--json", help="Print the numbers as JSON.", panel=RUN)]
Decisions = Annotated[bool, option("--decisions", help="Also write decisions.jsonl.", panel=RUN)]
Prices = Annotated[
    Optional[Path], option("--prices", help="TOML table of what a GPU costs an hour; adds cost.", panel=RUN)
]
Executor = Annotated[str, option("--executor", help="Where runs go: local | ray. Default local.", panel=RUN)]
Backend = Annotated[
    str,
    option("--backend", help="auto | cpu | cuda. Default auto: cuda if there is a GPU, else cpu.", panel=HARDWARE),
]
