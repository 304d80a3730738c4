"""JSON as the project writes and reads it.

Traces are read by ``traces.files.json_records``, line by line: they are large, and what others wrote is mended there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.value_file import fault, read_values
from ground.whole_file import write_whole

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def json_text(value: Any, *, sort_keys: bool = False, strict: bool = False) -> str:
    """Lay ``value`` out for people and programs. What is no number (NaN, infinity) does not exist in JSON: it becomes null.

    Raises ``ValueError`` for it instead if ``strict``, and ``TypeError`` for what is no JSON at all.
    """
    kept = value if strict else _finite(value)
    return json.dumps(kept, sort_keys=sort_keys, indent=2, ensure_ascii=False, allow_nan=False)


def json_line(value: Any) -> str:
    """Write ``value`` as short as possible, on one line whatever it holds: in ASCII, and without a line's end.

    Raises ``ValueError`` for what is no number.
    """
    return _ENCODER.encode(value)


def json_phrase(value: Any) -> str:
    """Write ``value`` as it stands in a sentence or in the cell of a table."""
    return json.dumps(value, ensure_ascii=False)


def as_read_back(value: Any) -> Any:
    """Give what a program finds that reads ``json_text(value)``: tuples are lists, and what is no number is None."""
    return json.loads(json_text(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, error: type[Exception] = InputError, *, sort_keys: bool = False) -> None:
    """Write a file that is to be read back: all of it or nothing.

    Raises ``error`` in one line for values that JSON does not have, and where the file cannot be written.
    """
    try:
        text = json_text(value, sort_keys=sort_keys, strict=True)
    except (TypeError, ValueError) as problem:
        raise error(f"{path}: cannot hold these values: {problem}") from problem
    write_whole(path, text + "\n", error)


def read_json(path: Path, error: type[Exception] = InputError) -> dict[str, Any]:
    """Read the object in a file, one compressed by gzip if its name ends in .gz. Raises ``error`` with one line."""
    # Of bytes, which may begin with a mark.
    return read_values(path, error, _unpacked if path.suffix == ".gz" else json.loads, "a JSON object")


def _unpacked(content: bytes) -> Any:
    import gzip
    import zlib

    try:
        text = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as problem:
        raise ValueError(f"is no whole gzip file: {problem}") from problem
    return json.loads(text)


def read_json_lines(path: Path, error: type[Exception] = InputError) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read (line number from 1, object) of each line of a file that holds one; empty lines are left out.

    Raises ``error`` with one line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as problem:
            raise error(f"{path}: line {number}, column {problem.colno}: {problem.msg}") from problem
        except (ValueError, RecursionError) as problem:
            raise error(f"{path}: line {number}: {fault(problem)}") from problem
        if not isinstance(value, dict):
            raise error(f"{path}: line {number}: not a JSON object")
        yield number, value


def holds_lines(path: Path, error: type[Exception] = InputError) -> bool:
    """Tell whether the first line of a file is an object by itself, so that ``read_json_lines`` reads it: what is laid out
    for people is not. Raises ``error`` with one line for a file that cannot be opened."""
    try:
        with path.open("rb") as file:
            line = next((line for line in file if line.strip()), b"")
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    try:
        return isinstance(json.loads(line.removeprefix(b"\xef\xbb\xbf")), dict)
    except (ValueError, RecursionError):
        return False
