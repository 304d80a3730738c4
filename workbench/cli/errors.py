"""Bad input as one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from ground.errors import InputError
from workbench.scheduler.own_code import failure
from workbench.scheduler.settings import ConfigError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the project's own errors, the system's about files, and whatever fails in code of the user's own, into
    ``error: ...`` and exit code 2."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except InputError as error:
        _fail(f"{error}; {error.hint}" if error.hint else str(error))
    except ConfigError as error:
        _fail(str(error))
    except ValueError as error:  # what libraries raise over a value
        _fail(failure(error) or str(error))
    except MemoryError as error:
        _fail(f"there is not enough memory for this: {error}" if str(error) else "there is not enough memory for this")
    except Exception as error:
        if (said := failure(error)) is None:
            raise
        _fail(said)


def exit_code_of(run: Callable[[], int]) -> int:
    """Call ``run`` and return its exit code, or that of an error, which is said in one line."""
    try:
        with one_line_errors():
            return run()
    except typer.Exit as ended:
        return ended.exit_code


def _fail(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    raise typer.Exit(2)
