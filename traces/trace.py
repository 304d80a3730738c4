"""A trace: a file of requests that can be read again and again, from the first request on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from traces.fields import parse_json
from traces.files import Source
from traces.formats import FORMATS, Format, Head, Reading
from traces.formats.sharegpt import conversations
from traces.formats.table import columns
from traces.request import TraceRequest
from traces.since_first import SinceFirst, check_span
from traces.text import Tokenizer, load_tokenizer

SAMPLE = Path(__file__).parent / "samples" / "sample.jsonl"


@dataclass
class TraceInfo:
    """What is known of a trace beside its requests."""

    name: str
    """The file's name without its endings."""
    path: str
    format: str
    waits: Callable[[], bool] = field(repr=False)
    """Finds out `closed_loop`."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of how the file was understood. Counts appear once a pass has reached the end."""

    @cached_property
    def closed_loop(self) -> bool:
        """Whether some turns wait for others to finish, so that arrivals depend on how fast they are served.

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
    """One pass."""

    def __iter__(self) -> Iterator[TraceRequest]:
        return self.read()

    def sha256(self) -> str:
        """Hex digest of the file's bytes; of the file as it is, whatever was reshaped since.

        Raises TraceError when it cannot be read.
        """
        return self.source.sha256()


def open_trace(path: str | Path, format: str = "auto", tokenizer: str | Path | None = None) -> Trace:
    """Open a trace in any of `traces.FORMATS`, plain, gzip or zstd; `auto` tells the format by its first record.

    `tokenizer` is a tokenizer.json or a folder with one; only traces of text need it.

    Raises TraceError for a file that is missing, empty or of no known format, and ValueError for a format's name that
    does not exist.
    """
    source = Source(Path(path))
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown trace format '{format}'; known: {', '.join(['auto', *FORMATS])}")
    head = _head(source)
    if format == "auto":
        chosen = next((known for known in FORMATS.values() if known.sniff(head)), None)
        if chosen is None:
            raise source.error(1, "", f"is the start of no known format; name one with --format ({', '.join(FORMATS)})")
    else:
        chosen = FORMATS[format]
    info = TraceInfo(
        name=_name(source.path),
        path=str(path),
        format=chosen.name,
        waits=partial(_has_sessions, chosen, source),
        notes=list(chosen.notes),
    )
    reader = load_tokenizer(Path(tokenizer)) if tokenizer is not None else None
    return Trace(info, source, partial(_checked, chosen, source, reader, info))


def sample_path() -> Path:
    """The small trace that comes with the package."""
    return SAMPLE


def _has_sessions(chosen: Format, source: Source) -> bool:
    return source.holds(b'"session_id"') if chosen.closed_loop is None else chosen.closed_loop


def _name(path: Path) -> str:
    name = path.name
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    return Path(name).stem


def _head(source: Source) -> Head:
    """The first record.

    Raises TraceError when the file holds nothing.
    """
    line, first = next(source.lines(), (0, b""))
    if not line:
        raise source.error(0, "", "holds no requests: the file is empty")
    if first.startswith(b"["):
        return Head(record=next(conversations(source), (0, {}))[1])
    if first.startswith(b"{"):
        return Head(record=parse_json(source, line, first))
    return Head(columns=columns(source, line, first))


def _checked(chosen: Format, source: Source, tokenizer: Tokenizer | None, info: TraceInfo) -> Iterator[TraceRequest]:
    """One pass with the checks every format shares."""
    ids: set[int] = set()
    last_s, last_line, empty = 0.0, 0, True
    clock: SinceFirst | None = None
    for request in chosen.read(Reading(source, tokenizer, info.note)):
        empty = False
        if (arrival_s := request.arrival_s) is not None:
            if arrival_s < last_s:
                raise source.error(
                    request.line,
                    "",
                    f"arrivals go back: {arrival_s:.12g} s after {last_s:.12g} s on line {last_line}",
                )
            last_s, last_line = arrival_s, request.line
            if clock is None:
                clock = SinceFirst(arrival_s)
                for note in clock.notes:
                    info.note(note)
            request.arrival_s = clock.since_s(arrival_s)
        check_span(source, request)
        if chosen.ids_from_file:
            # Hashes, not texts: 64 bits make a false alarm among a million ids a matter of one in 10^7.
            mark = hash(request.request_id)
            if mark in ids:
                raise source.error(request.line, "request_id", f"'{request.request_id}' appears twice")
            ids.add(mark)
        yield request
    if empty:
        raise source.error(0, "", "holds no requests")
