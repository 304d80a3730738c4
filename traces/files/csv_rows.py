"""Rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from traces.files.counted import counted
from traces.files.source import Source

_DELIMITERS = ",;\t|"


def columns(source: Source, line: int, header: bytes) -> tuple[str, ...]:
    """The column names of a header line.

    Raises TraceError when it is not a line of CSV.
    """
    return tuple(cell.strip() for cell in _cells(source, line, header, delimiter_of(header)))


def delimiter_of(header: bytes) -> str:
    """Find the delimiter: a comma or, in a header without one, what other programs put there."""
    return next((mark for mark in _DELIMITERS if mark.encode() in header), ",")


class Table:
    """The wanted columns of a CSV file, in the wanted order.

    Raises TraceError when the header lacks one.
    """

    def __init__(self, source: Source, wanted: tuple[str, ...]) -> None:
        self.source = source
        self._lines = source.lines()
        line, header = next(self._lines, (0, b""))
        self._delimiter = delimiter_of(header)
        self.header = columns(source, line, header) if line else ()
        for column in wanted:
            if line and column not in self.header:
                fault = source.error(line, column, "column is missing from the header")
                fault.of_a_row = False
                raise fault
        self._places = [self.header.index(column) for column in wanted] if line else []

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(1-based line, bytes) of every row below the header."""
        return self._lines

    def cells(self, line: int, row: bytes) -> list[str]:
        """The wanted cells of a row.

        Raises TraceError when it is not a line of CSV or has another number of cells than the header.
        """
        cells = _cells(self.source, line, row, self._delimiter)
        if len(cells) != len(self.header):
            raise self.source.error(
                line, "", f"has {counted(len(cells), 'cell')} where the header has {len(self.header)}"
            )
        return [cells[place].strip() for place in self._places]


def _cells(source: Source, line: int, row: bytes, delimiter: str) -> list[str]:
    try:
        text = row.decode()
    except UnicodeDecodeError:
        raise source.error(line, "", "is not UTF-8 text") from None
    if '"' not in text:  # The common case, five times as fast.
        return text.split(delimiter)
    try:
        return next(csv.reader([text], strict=True, delimiter=delimiter), [])
    except csv.Error as fault:
        raise source.error(line, "", f"is not a line of CSV: {fault}") from None
