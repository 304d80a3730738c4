"""What a trace format is, and what its reader is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from traces.files import Source
from traces.request import TraceRequest
from traces.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Head:
    """A file's first record, by which `--format auto` tells the formats apart."""

    columns: tuple[str, ...] = ()
    """Of a CSV; empty for JSON."""
    record: dict[str, Any] | None = None
    """Of JSON lines; None for CSV."""

    def has(self, *fields: str) -> bool:
        """Whether the JSON record has all of these."""
        return self.record is not None and all(field in self.record for field in fields)


@dataclass(frozen=True, slots=True)
class Reading:
    """One pass over a file."""

    source: Source
    tokenizer: Tokenizer | None
    note: Callable[[str], None]
    """Says something the user should know; saying it again in a later pass changes nothing."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format that can be read."""

    name: str
    about: str
    sniff: Callable[[Head], bool]
    read: Callable[[Reading], Iterator[TraceRequest]]
    """Requests in file order, one pass in constant memory. Arrival order, ids and emptiness are checked by the caller."""
    closed_loop: bool | None
    """Whether later turns wait for earlier ones; None where it differs from file to file."""
    ids_from_file: bool
    """Whether request ids can repeat; readers that number the lines cannot repeat one."""
    notes: tuple[str, ...] = ()
    """True of every file of this format."""
