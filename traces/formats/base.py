"""A trace format, and what its reader is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from traces.files.bad_rows import BadRows
from traces.files.counted import counted
from traces.files.csv_rows import Table
from traces.files.dates import Times
from traces.files.errors import TraceError
from traces.files.json_records import records
from traces.files.source import Source
from traces.files.values import MISSING, length, parse_json
from traces.requests.lengths import HELP, Lengths
from traces.requests.text import Tokenizer
from traces.requests.trace_request import TraceRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Head:
    """A file's first record, by which `--format auto` tells the formats apart."""

    columns: tuple[str, ...] = ()
    """Columns of a CSV; empty for JSON."""
    record: dict[str, Any] | None = None
    """First record of JSON; None for CSV."""
    in_array: bool = False
    """True where the JSON records are elements of one array."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its columns or fields."""
        return self.columns if self.record is None else tuple(self.record)

    def has(self, *fields: str) -> bool:
        """Tell whether the JSON record has all of these."""
        return self.record is not None and all(field in self.record for field in fields)


@dataclass(slots=True)
class Reading:
    """One pass over a file."""

    source: Source
    head: Head
    tokenizer: Tokenizer | None
    note: Callable[[str], None]
    """Says something the user should know; saying it again in a later pass changes nothing."""
    bad_rows: BadRows = field(default_factory=lambda: BadRows(skip=False))
    output: Lengths | None = None
    """Output lengths of requests that have none."""
    output_spec: str = ""
    """Those, in the user's words."""
    seed: int = 0
    block_tokens: int | None = None
    """Tokens of a block of `hash_ids`, where the user says it."""
    unit: str | None = "s"
    """Unit of the arrivals that the reader gives; None: they are seconds, and no user's word changes that. A reader that
    finds it in the file sets it."""
    unit_is_sure: bool = True
    asked_unit: str = "auto"
    """Unit as the user says it, which the caller applies."""
    drawn: bool = False
    """True where any was needed so far."""
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    """Skipped rows that the publishers of a format call failures: their number by kind and reason."""
    mended: int = 0
    """Records with broken characters."""
    mended_first: str = ""
    """Place of the first of them."""
    _rng: np.random.Generator | None = None
    _times: list[Times] = field(default_factory=list)

    def times(self, field: str) -> Times:
        """Return the reader of a column's or field's times in this pass."""
        self._times.append(Times(field))
        return self._times[-1]

    @property
    def dates(self) -> bool:
        """True where times so far were dates, which come as seconds whatever the unit of numbers is."""
        return any(times.dates for times in self._times)

    def json(self, make: Callable[[Source, int, dict[str, Any]], T]) -> Iterator[T]:
        """Yield what `make(source, number, record)` makes of every JSON record. Bad rows are counted.

        The source names the record's place in errors, together with the number, which is the line's in JSON lines.
        """
        for source, number, raw in records(self.source, self._mend):
            try:
                made = make(source, number, parse_json(source, number, raw))
            except TraceError as fault:
                self.bad_rows.add(fault)
                continue
            yield made

    def csv(self, columns: tuple[str, ...], make: Callable[[Source, int, list[str]], T | None]) -> Iterator[T]:
        """Yield what `make(source, line, cells)` makes of every row; None is left out. The cells are those of `columns`.
        Bad rows are counted.

        Raises TraceError for a file that is JSON.
        """
        if self.head.record is not None:
            raise self.source.error(0, "", "is JSON, where the format that was asked for is CSV")
        table = Table(self.source, columns)
        for line, row in table.lines():
            try:
                made = make(self.source, line, table.cells(line, row))
            except TraceError as fault:
                self.bad_rows.add(fault)
                continue
            if made is not None:
                yield made

    def output_length(self, source: Source, line: int, name: str, value: Any) -> int:
        """An output length, or a drawn one where the record has none.

        Raises TraceError when it is no length, or missing with none to draw.
        """
        if value is not MISSING and value is not None and value != "":
            return length(source, line, name, value)
        if self.output is None:
            fault = source.error(line, name, "is missing")
            fault.hint = f"--output draws such lengths ({HELP}), --skip-bad-rows leaves such rows out"
            raise fault
        if self._rng is None:
            self._rng = np.random.default_rng([self.seed, 2])
        self.drawn = True
        return self.output.draw(self._rng)

    def skip(self, what: str, why: str, count: int = 1) -> None:
        """Count what is no request by the word of those who published the format, whatever is done with bad rows."""
        if count:
            self.failures[what, why] = self.failures.get((what, why), 0) + count

    def left_out(self) -> list[str]:
        """Lines that say how much of the file was left out so far, and why."""
        said = [self.bad_rows.note()] if self.bad_rows.kinds else []
        for (what, why), count in self.failures.items():
            said.append(f"{counted(count, what)} ({why}) {'was' if count == 1 else 'were'} skipped")
        return said

    def _mend(self, place: str) -> None:
        self.mended += 1
        self.mended_first = self.mended_first or place

    def finish(self, complete: bool) -> None:
        """Say what was counted, at the end of the pass; `complete` if that is the end of the file."""
        for said in self.left_out():
            self.note(said)
        if self.drawn:
            self.note(f"output lengths that the file lacks are drawn: {self.output_spec}, seed {self.seed}")
        elif self.output is not None and complete:
            self.note("--output had nothing to do: every request has an output length")
        if self.mended:
            have = "has" if self.mended == 1 else "have"
            self.note(
                f"{counted(self.mended, 'record')} {have} halves of surrogate pairs, which are no characters: "
                f"read as U+FFFD (first: {self.mended_first})"
            )


@dataclass(frozen=True, slots=True)
class Format:
    """A format that can be read."""

    name: str
    about: str
    sniff: Callable[[Head], bool]
    read: Callable[[Reading], Iterator[TraceRequest]]
    """Requests in file order, one pass in constant memory. Arrival order, ids and emptiness are checked by the caller."""
    closed_loop: bool | None
    """True where later turns wait for earlier ones; None where it differs from file to file."""
    ids_from_file: bool
    """True where request ids can repeat; readers that number the lines cannot repeat one."""
    notes: tuple[str, ...] = ()
    """True of every file of this format."""
    needs: tuple[str, ...] = ()
    """Columns or fields by which it is known, for the message when no format fits."""
    time_unit: str | None = None
    """Unit of numeric arrivals as the reader gives them, which a user may know better; None: it is a fact, and the reader
    gives seconds."""
    time_unit_is_sure: bool = True
    """True where the format says the unit, so that it is not guessed from the numbers."""
    logged: bool = False
    """True where arrivals come from a log, whose clock may tick coarsely. Times that somebody chose mean what they say."""
    draws_output: bool = False
    """True where a request may lack its output length."""
    has_blocks: bool = False
    """True where the size of a block of hash ids is not in the file, so that a user may know it better."""
    session_mark: bytes = b""
    """Text in every file with sessions, where `closed_loop` is None; empty: the requests are looked at."""
