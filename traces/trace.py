"""A trace: a file of requests that can be read again and again, from the first request on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ground.errors import InputError
from traces.files.bad_rows import BadRows
from traces.files.look_ahead import look_ahead
from traces.files.source import Source
from traces.files.values import MOST_TOKENS
from traces.formats import FORMATS, Format, Head, Reading
from traces.formats.time_units import check_unit, in_seconds
from traces.head import read_head, unknown_format
from traces.order import by_arrival, in_order
from traces.requests.lengths import parse_lengths
from traces.requests.text import Tokenizer, load_tokenizer
from traces.requests.trace_request import TraceRequest
from traces.since_first import SinceFirst, check_span
from traces.ticks import AUTO, parse_spread, spread_ticks

Begin = Callable[[Callable[[str], None]], Reading]
"""Starts a pass over a file, given where its notes go."""
SAMPLE = Path(__file__).parent / "samples" / "sample.jsonl"


@dataclass
class TraceInfo:
    """The facts of a trace beside its requests."""

    name: str
    """The file's name without its endings."""
    path: str
    format: str
    waits: Callable[[], bool] = field(repr=False)
    """Tells `closed_loop`, reading what that takes."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user on how the file was understood. Counts appear once a pass has reached the end."""

    @cached_property
    def closed_loop(self) -> bool:
        """True where some turns wait for others to finish, so that arrivals depend on how fast they are served.

        In our own format that differs from file to file: the first look at it scans the file up to the first session.
        """
        return self.waits()

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in file order; iterating opens the file and reads it as it goes.

    Times count from the first request, which arrives at 0. Arrivals never decrease, a session's turns follow each other
    in order, and request ids differ. A fault raises TraceError when the reading gets to it.
    """

    info: TraceInfo
    source: Source
    read: Callable[[], Iterator[TraceRequest]]
    """Read the file once."""

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.read()

    def sha256(self) -> str:
        """Hex digest of the file's bytes; of the file as it is, whatever was reshaped since.

        Raises TraceError when it cannot be read.
        """
        return self.source.sha256()


@dataclass(frozen=True, slots=True)
class ReadAs:
    """The reading of a file, where it does not say itself. Raises InputError for words it does not know."""

    format: str | Format = "auto"
    """The name of one of `traces.FORMATS`, or a format of one's own (`traces.given.own_format`)."""
    tokenizer: str | Path | None = None
    """tokenizer.json or a folder with one; only traces of text need it."""
    time_unit: str = "auto"
    """Unit of times that are plain numbers: one of `traces.formats.time_units.CHOICES`."""
    spread_ticks: str = "auto"
    """Equal arrivals: auto (where the file's clock ticks), off, or the tick in seconds."""
    block_tokens: int | None = None
    """Tokens of a block of hash ids, where the file does not say."""
    output: str | None = None
    """Lengths to draw for requests without one, as `traces.requests.lengths` reads them."""
    skip_bad_rows: bool = False
    sort: bool = False
    """True to sort by arrival, with all requests in memory."""
    ordered: bool = True
    """True where arrivals count, so that they may not go back."""
    seed: int = 0
    """Seed of drawn output lengths."""

    def __post_init__(self) -> None:
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            raise InputError(f"unknown trace format '{self.format}'; known: {', '.join(['auto', *FORMATS])}")
        check_unit(self.time_unit)
        parse_spread(self.spread_ticks)
        if self.block_tokens is not None and not 1 <= self.block_tokens <= MOST_TOKENS:
            raise InputError(f"block-tokens: {self.block_tokens} is not a number of tokens from 1 on")
        if self.output is not None:
            parse_lengths(self.output)

    def check(self, path: str, chosen: Format) -> None:
        """Check that the format has a use for what was asked. Raises InputError."""
        for flag, asked, usable, reason in (
            ("--time-unit", self.time_unit != "auto", chosen.time_unit is not None, "says the unit of its times"),
            ("--block-tokens", self.block_tokens is not None, chosen.has_blocks, "has no blocks of unknown size"),
            ("--output", self.output is not None, chosen.draws_output, "always has output lengths"),
        ):
            if asked and not usable:
                raise InputError(f"{flag}: {path} is read as {chosen.name}, which {reason}")


def open_trace(
    path: str | Path, format: str | Format = "auto", tokenizer: str | Path | None = None, **how: Any
) -> Trace:
    """Open a trace in any of `traces.FORMATS` or in one that is given, plain, gzip or zstd; `auto` tells the format by its
    first record.

    `how` are the other fields of :class:`ReadAs`.

    Raises TraceError for a file that is missing, empty or of no known format, and ValueError for a format's name that
    does not exist and for what a format has no use for.
    """
    read_as = ReadAs(format, tokenizer, **how)
    source = Source(Path(path))
    if isinstance(format, Format):
        return trace_by(format, source, Head(), read_as)
    head = read_head(source, read_as.skip_bad_rows)
    if format == "auto":
        chosen = next((known for known in FORMATS.values() if known.sniff(head)), None)
        if chosen is None:
            raise source.error(0 if head.in_array else 1, "", unknown_format(head))
    else:
        chosen = FORMATS[format]
    return trace_by(chosen, source, head, read_as)


def trace_by(chosen: Format, source: Source, head: Head, read_as: ReadAs) -> Trace:
    """The trace that a format reads from `source`, which begins with `head`. Raises as :func:`open_trace` does."""
    read_as.check(str(source.path), chosen)
    reader = load_tokenizer(Path(read_as.tokenizer)) if read_as.tokenizer is not None else None
    begin = partial(_reading, chosen, source, head, reader, read_as)
    info = TraceInfo(
        name=_name(source.path),
        path=str(source.path),
        format=chosen.name,
        waits=partial(_has_sessions, chosen, begin),
        notes=list(chosen.notes),
    )
    return Trace(info, source, partial(_checked, chosen, begin, info, read_as))


def sample_path() -> Path:
    """The small trace that comes with the package."""
    return SAMPLE


def _has_sessions(chosen: Format, begin: Begin) -> bool:
    if chosen.closed_loop is not None:
        return chosen.closed_loop
    reading = begin(lambda text: None)
    if chosen.session_mark:
        return reading.source.holds(chosen.session_mark)
    first, _ = look_ahead(chosen.read(reading))
    return any(request.session_id is not None for request in first)


def _name(path: Path) -> str:
    name = path.name
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    return Path(name).stem


def _reading(
    chosen: Format,
    source: Source,
    head: Head,
    tokenizer: Tokenizer | None,
    read_as: ReadAs,
    note: Callable[[str], None],
) -> Reading:
    return Reading(
        source,
        head,
        tokenizer,
        note,
        bad_rows=BadRows(read_as.skip_bad_rows),
        output=parse_lengths(read_as.output) if read_as.output is not None else None,
        output_spec=read_as.output or "",
        seed=read_as.seed,
        block_tokens=read_as.block_tokens,
        unit=chosen.time_unit,
        unit_is_sure=chosen.time_unit_is_sure,
        asked_unit=read_as.time_unit,
    )


def _checked(chosen: Format, begin: Begin, info: TraceInfo, read_as: ReadAs) -> Iterator[TraceRequest]:
    """Read once, with all that every format shares: bad rows, the unit of times, order, ticks, and times from 0."""
    reading = begin(info.note)
    requests: Iterable[TraceRequest] = chosen.read(reading)
    if chosen.ids_from_file:
        requests = _distinct(reading, requests)
    if chosen.time_unit is not None:
        requests = in_seconds(reading, requests)
    if read_as.sort:
        requests = by_arrival(requests, info.note)
    elif read_as.ordered:
        requests = in_order(reading.source, requests)
    spread = parse_spread(read_as.spread_ticks)
    if read_as.ordered and (spread != AUTO or chosen.logged):
        requests = spread_ticks(requests, spread, info.note)
    clock: SinceFirst | None = None
    empty, complete = True, False
    try:
        for request in requests:
            empty = False
            if request.arrival_s is not None:
                if clock is None:
                    clock = SinceFirst(request.arrival_s)
                    if clock.note and not reading.dates:  # Those count from a minute that is in no file.
                        info.note(clock.note)
                request.arrival_s = clock.since_s(request.arrival_s)
            check_span(reading.source, request)
            yield request
        complete = True
    finally:  # What was left out is said of a pass that ends early, too.
        reading.finish(complete)
    if empty:
        why = "; ".join(reading.left_out())
        raise reading.source.error(0, "", "holds no requests" + (f": {why}" if why else ""))


def _distinct(reading: Reading, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """Requests whose ids differ; one that has another's is a bad row, unless it is a turn that others wait for."""
    ids: set[int] = set()
    for request in requests:
        # Hashes, not texts: 64 bits make a false alarm among a million ids a matter of one in 10^7.
        mark = hash(request.request_id)
        if mark in ids:
            fault = reading.source.error(request.line, "request_id", f"'{request.request_id}' appears twice")
            fault.of_a_row = request.session_id is None
            reading.bad_rows.add(fault)
            continue
        ids.add(mark)
        yield request
