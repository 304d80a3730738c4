"""The flags that say how a trace file is to be read: every command that reads one has them."""

from __future__ import annotations

import functools
import inspect
import shlex
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from workbench.cli.options import SHAPE, option

if TYPE_CHECKING:
    from traces import Trace

LENGTHS = "N, A-B, or lognormal:mean=M|median=M,sigma=S[,max=N]"
"""How lengths are written. `traces.lengths` has it too: this module is imported before `traces` may be."""

Format = Annotated[str, option("--format", help="Trace format. Default: recognised from the content.", panel=SHAPE)]
Tokenizer = Annotated[
    Optional[Path], option("--tokenizer", help="tokenizer.json or its folder, for traces of text.", panel=SHAPE)
]
TimeUnit = Annotated[
    str,
    option(
        "--time-unit",
        help="Unit of times that are plain numbers: s | ms | us | ns. Default: the format's, or found from them.",
        panel=SHAPE,
    ),
]
SpreadTicks = Annotated[
    str,
    option(
        "--spread-ticks",
        help="Equal arrivals: auto (spread over a tick, where the file's clock ticks) | off | the tick in seconds. Default auto.",
        panel=SHAPE,
    ),
]
BlockTokens = Annotated[
    Optional[int],
    option(
        "--block-tokens", help="Tokens of a block of hash ids. Default: the format's, or found from them.", panel=SHAPE
    ),
]
Output = Annotated[
    Optional[str],
    option(
        "--output",
        help=f"Draw output lengths that the trace lacks: {LENGTHS}.",
        panel=SHAPE,
    ),
]
SkipBadRows = Annotated[
    bool, option("--skip-bad-rows", help="Leave out rows that cannot be a request, counted in a note.", panel=SHAPE)
]
Sort = Annotated[bool, option("--sort", help="Order requests by arrival; reads the whole file first.", panel=SHAPE)]

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
NAMES = frozenset(_FLAGS)
TraceReading = dict[str, Any]
"""Values of the flags, by field."""


def with_trace_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which has a parameter `reading`, with the flags in that parameter's place. A flag that the command has
    itself, for it means more there, is its own."""
    own = inspect.signature(command).parameters
    hints = typing.get_type_hints(command, include_extras=True)
    flags = {name: flag for name, flag in _FLAGS.items() if name not in own}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        reading = {name: given.pop(name) for name in flags}
        command(**given, reading=reading)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        parameter.replace(kind=keyword, annotation=hints[name]) for name, parameter in own.items() if name != "reading"
    ]
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=flag) for name, (flag, default) in flags.items()
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # type: ignore[attr-defined]  # or its signature would be taken for this one's
    return wrapped


def open_as(path: Path, reading: TraceReading, *, ordered: bool = True, seed: int = 0) -> Trace:
    """The trace as the flags say. Without `ordered`, arrivals have no meaning and may go back; `seed` is that of drawn
    output lengths.

    Raises TraceError, and ValueError for flags that make no sense.
    """
    from traces import open_trace

    return open_trace(path, **reading, ordered=ordered, seed=seed)


def words_of(reading: TraceReading) -> str:
    """The flags that are not at their defaults, as one writes them."""
    words = []
    for name, value in reading.items():
        if value != _FLAGS[name][1]:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join(words)
