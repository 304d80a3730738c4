"""The one error bad trace input raises."""

from __future__ import annotations

from pathlib import Path


class TraceError(ValueError):
    """A trace that cannot be used, and where in it the fault lies.

    ``str()`` is one line: ``azure.csv, line 7, ContextTokens: '-3' is negative``. ``line`` 0 and an empty ``field`` are
    left out.
    """

    def __init__(self, path: str | Path, line: int, field: str, message: str) -> None:
        self.path = str(path)
        self.line = line
        self.field = field
        self.message = message
        where = self.path + (f", line {line}" if line else "") + (f", {field}" if field else "")
        super().__init__(f"{where}: {message}")

    def __reduce__(self) -> tuple[type[TraceError], tuple[str, int, str, str]]:
        # Exceptions are pickled by their args, which here are the finished line and not the constructor's arguments.
        return TraceError, (self.path, self.line, self.field, self.message)
