"""The first items of a stream, looked at before it is read on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

MOST_ITEMS = 2_000
"""Number of a file's records by which everything about the whole file is decided."""


def look_ahead(items: Iterable[T], most: int = MOST_ITEMS) -> tuple[list[T], Iterator[T]]:
    """Return (the first `most` items, all of them). What reading them raises is raised when the reading gets there again."""
    rest = iter(items)
    first: list[T] = []
    fault: Exception | None = None
    try:
        first.extend(islice(rest, most))
    except Exception as raised:
        fault = raised
    return first, _again(first, rest, fault)


def _again(first: list[T], rest: Iterator[T], fault: Exception | None) -> Iterator[T]:
    yield from first
    if fault is not None:
        raise fault
    yield from rest
