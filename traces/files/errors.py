"""The one error bad trace input raises."""

from __future__ import annotations

from pathlib import Path

from ground.errors import InputError


class TraceError(InputError):
    """A trace that cannot be used, and where in it the fault lies.

    ``str()`` is one line: ``azure.csv, line 7, ContextTokens: '-3' is negative``. ``line`` 0 and an empty ``field`` are
    left out.
    """

    def __init__(self, path: str | Path, line: int, field: str, message: str) -> None:
        # Its args are the constructor's: an exception is made again from them where it is pickled, and where a simulated
        # process hands it on.
        super().__init__(str(path), line, field, message)
        self.path = str(path)
        self.line = line
        self.field = field
        self.message = message
        self.of_a_row = line > 0 or field.startswith("[")
        """True where the fault is that of one row, so that the others may be read without it."""

    def __str__(self) -> str:
        where = self.path + (f", line {self.line}" if self.line else "") + (f", {self.field}" if self.field else "")
        return f"{where}: {self.message}"
