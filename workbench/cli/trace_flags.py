"""The flags that say how a trace file is to be read: every command that reads one has them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

from workbench.cli.options import option
from workbench.scheduler.settings import TRACE

LENGTHS = "N, A-B, lognormal:mean=M,sigma=S or lognormal:median=M,sigma=S (,max=N cuts its tail)"
"""How lengths are written. `traces.requests.lengths` has it too: this module is imported before `traces` may be."""

Format = Annotated[
    str,
    option(
        "--format", help="Trace format, or module:Class of your own. Default: recognised from the content.", panel=TRACE
    ),
]
Tokenizer = Annotated[
    Optional[Path], option("--tokenizer", help="tokenizer.json or its folder, for traces of text.", panel=TRACE)
]
TimeUnit = Annotated[
    str,
    option(
        "--time-unit",
        help="Unit of times that are plain numbers: s | ms | us | ns. Default: the format's, or found from them.",
        panel=TRACE,
    ),
]
SpreadTicks = Annotated[
    str,
    option(
        "--spread-ticks",
        help="Equal arrivals: auto (spread over a tick, where the file's clock ticks) | off | the tick in seconds. Default auto.",
        panel=TRACE,
    ),
]
BlockTokens = Annotated[
    Optional[int],
    option(
        "--block-tokens", help="Tokens of a block of hash ids. Default: the format's, or found from them.", panel=TRACE
    ),
]
Output = Annotated[
    Optional[str],
    option(
        "--output",
        help=f"Draw output lengths that the trace lacks: {LENGTHS}.",
        panel=TRACE,
    ),
]
SkipBadRows = Annotated[
    bool, option("--skip-bad-rows", help="Leave out rows that cannot be a request, counted in a note.", panel=TRACE)
]
Sort = Annotated[bool, option("--sort", help="Order requests by arrival; reads the whole file first.", panel=TRACE)]

_FLAGS: dict[str, tuple[Any, Any]] = {
    "format": (Format, "auto"),
    "tokenizer": (Tokenizer, None),
    "time_unit": (TimeUnit, "auto"),
    "spread_ticks": (SpreadTicks, "auto"),
    "block_tokens": (BlockTokens, None),
    "output": (Output, None),
    "skip_bad_rows": (SkipBadRows, False),
    "sort": (Sort, False),
}
"""Fields of `traces.trace.ReadAs`, each with its flag and default."""
TraceReading = dict[str, Any]
"""Values of the flags, by field."""


@dataclass(frozen=True)
class TraceFlags:
    """The flags as a group of a command."""

    name: str = "reading"

    def declared(self) -> dict[str, tuple[Any, Any]]:
        return _FLAGS

    def leading(self) -> tuple[str, ...]:
        return ()

    def taken(self, values: TraceReading) -> TraceReading:
        return values


def words_of(reading: TraceReading) -> str:
    """The flags that are not at their defaults, as one writes them."""
    words = []
    for name, value in reading.items():
        if value != _FLAGS[name][1]:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)
