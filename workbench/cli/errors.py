"""Bad input as one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ground.errors import InputError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the project's own errors, and the system's about files, into ``error: ...`` and exit code 2."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except InputError as error:
        _fail(f"{error}; {error.hint}" if error.hint else str(error))
    except ValueError as error:  # the scheduler's ConfigError, and what libraries raise over a value
        _fail(str(error))
    except MemoryError as error:
        _fail(f"there is not enough memory for this: {error}" if str(error) else "there is not enough memory for this")


def _fail(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    raise typer.Exit(2)
