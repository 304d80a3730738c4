"""Rows that cannot be a request: an error, unless they are to be left out, and then counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from traces.files.counted import counted
from traces.files.errors import TraceError

MOST_KINDS = 5
"""Named in a note; of the others it gives the number."""
HINT = "--skip-bad-rows leaves such rows out"
_QUOTED = re.compile(r"'.*'\s*")


@dataclass(slots=True)
class _Kind:
    rows: int
    first: TraceError


@dataclass(slots=True)
class BadRows:
    """The bad rows that one pass over a file found."""

    skip: bool
    kinds: dict[tuple[str, str], _Kind] = field(default_factory=dict)
    """Bad rows by field and what is wrong with it, whatever the value."""

    def add(self, fault: TraceError) -> None:
        """Count a bad row.

        Raises the fault when it is not the row's, and when bad rows are not to be skipped: then with that as its hint.
        """
        if not fault.of_a_row:
            raise fault
        if not self.skip:
            fault.hint = fault.hint or HINT
            raise fault
        key = (re.sub(r"\[\d+\]\.?", "", fault.field), _QUOTED.sub("", fault.message))
        if key in self.kinds:
            self.kinds[key].rows += 1
        else:
            self.kinds[key] = _Kind(1, fault)

    @property
    def rows(self) -> int:
        return sum(kind.rows for kind in self.kinds.values())

    def note(self) -> str:
        """One line: how many of which kind, and where the first of each is."""
        parts = []
        for (name, message), kind in list(self.kinds.items())[:MOST_KINDS]:
            first = kind.first
            place = f"line {first.line}" if first.line else first.field
            parts.append(f"{kind.rows} x {name + ' ' if name else ''}{message} (first: {place})")
        if len(self.kinds) > MOST_KINDS:
            parts.append(f"and {counted(len(self.kinds) - MOST_KINDS, 'more kind')}")
        rows = self.rows
        return f"{counted(rows, 'bad row')} {'was' if rows == 1 else 'were'} skipped: {'; '.join(parts)}"
