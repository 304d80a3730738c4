"""CSV tables of profiles, plain or gzip, read into columns, and the folders that hold them."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.cost.models.operator_tables import ProfileError


def sizes(path: Path) -> list[int]:
    """Tensor-parallel sizes that were measured, ascending."""
    return sorted(int(p.name[2:]) for p in path.glob("tp*") if p.is_dir() and p.name[2:].isdigit())


def size_folder(path: Path, tp: int) -> Path:
    """The folder of one tensor-parallel size, ``tp<N>/``. Raises :class:`ProfileError` for one that was not measured."""
    have = sizes(path)
    if tp not in have:
        known = ", ".join(f"tp{n}" for n in have) or "none"
        raise ProfileError(f"{path}: no measurements for tp {tp}; it holds {known}")
    return path / f"tp{tp}"


def find_table(folder: Path, name: str, *, missing_ok: bool = False) -> Any:
    """The file of a table, ``NAME.csv`` or ``NAME.csv.gz``. Raises :class:`ProfileError`, or gives None if that is
    allowed."""
    for suffix in (".csv", ".csv.gz"):
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    if missing_ok:
        return None
    raise ProfileError(f"{folder}: no table {name!r} ({name}.csv or {name}.csv.gz)")


def read_table(
    path: Path, text: tuple[str, ...], numbers: tuple[str, ...], optional: Mapping[str, float | str] | None = None
) -> dict[str, Any]:
    """Columns of a table: ``text`` as lists of str, ``numbers`` as float arrays, and the ``optional`` ones as either, each
    with the value it has where a table lacks it. Other columns are ignored.

    Raises :class:`ProfileError` with file, line and column for what is missing or is not a number of 0 or more.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8") as file:  # type: ignore[operator]
            rows = csv.reader(file)
            header = next(rows, [])
            for name in (*text, *numbers):
                if name not in header:
                    raise ProfileError(f"{path}: line 1: no column {name!r}")
            body = [row for row in rows if row]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"{path}: {error}") from error
    if not body:
        raise ProfileError(f"{path}: no rows")
    for line, row in enumerate(body, 2):
        if len(row) != len(header):
            raise ProfileError(f"{path}: line {line}: {len(row)} fields where the header has {len(header)}")
    optional = optional or {}
    words = {*text, *(name for name, value in optional.items() if isinstance(value, str))}
    columns: dict[str, Any] = {}
    for name in (*text, *numbers, *optional):
        if name not in header:
            columns[name] = [optional[name]] * len(body) if name in words else np.full(len(body), optional[name])
            continue
        at = header.index(name)
        if name in words:
            columns[name] = [row[at] for row in body]
            continue
        try:
            columns[name] = np.array([row[at] for row in body], np.float64)
        except ValueError:
            columns[name] = np.array([_number(row[at], path, line, name) for line, row in enumerate(body, 2)])
        if (wrong := first_unfit(columns[name])) is not None:
            raise ProfileError(f"{path}: line {wrong + 2}: {name}: {body[wrong][at]!r} is not a number of 0 or more")
    return columns


def first_unfit(numbers: np.ndarray) -> int | None:
    """The place of the first that is not a finite number of 0 or more; None where all are."""
    bad = ~((numbers >= 0) & (numbers < np.inf))
    return int(bad.argmax()) if bad.any() else None


def _number(value: str, path: Path, line: int, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ProfileError(f"{path}: line {line}: {name}: {value!r} is not a number") from None
