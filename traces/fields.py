"""Checks of single values: each takes what the file says, and returns it typed or raises the one-line error."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from traces.files import Source

MISSING: Any = object()
"""Stands for a field the record does not have."""
MOST_TOKENS = 100_000_000
"""Far beyond any model's context: a longer request is a mistake in the file, and its tokens would fill the memory."""
MOST = 1 << 53
"""Whole numbers up to here are exact everywhere a record takes them."""
MOST_TIME = 10**19
"""In a file's own unit: nanoseconds since 1970, until 2286."""


def parse_json(source: Source, line: int, text: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises TraceError when it is not JSON, or not an object.
    """
    try:
        record = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise source.error(line, "", f"not valid JSON: {fault}") from None
    if not isinstance(record, dict):
        raise source.error(line, "", "is not a JSON object")
    return record


def integer(source: Source, line: int, field: str, value: Any) -> int:
    """A whole number; text, as CSV has it, is parsed.

    Raises TraceError when it is missing or not a whole number.
    """
    if value is MISSING or value is None or value == "":
        raise source.error(line, field, "is missing")
    try:
        number = int(value) if type(value) in (int, str) else None
    except ValueError:
        number = None
    if number is None:
        raise source.error(line, field, f"'{value}' is not an integer")
    if abs(number) > MOST:
        raise source.error(line, field, f"'{value}' is larger than any number here may be")
    return number


def length(source: Source, line: int, field: str, value: Any, most: int = MOST_TOKENS) -> int:
    """A number of tokens, from 1 to `most`.

    Raises TraceError when it is not.
    """
    number = count(source, line, field, value, most)
    if number == 0:
        raise source.error(line, field, "is 0; a request has at least 1 token")
    return number


def count(source: Source, line: int, field: str, value: Any, most: int = MOST_TOKENS) -> int:
    """A number of tokens or turns, from 0 to `most`.

    Raises TraceError when it is not.
    """
    number = integer(source, line, field, value)
    if number < 0:
        raise source.error(line, field, f"'{value}' is negative")
    if number > most:
        raise source.error(line, field, f"'{value}' is more than the {most:,} tokens a request may have")
    return number


def seconds(source: Source, line: int, field: str, value: Any) -> float:
    """A time or duration that is finite and not negative, in the file's own unit; text is parsed.

    Raises TraceError when it is not.
    """
    if value is MISSING or value is None or value == "":
        raise source.error(line, field, "is missing")
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise source.error(line, field, f"'{value}' is not a finite number")
    if number < 0:
        raise source.error(line, field, f"'{value}' is negative")
    if number > MOST_TIME:
        raise source.error(line, field, f"'{value}' is larger than any number here may be")
    return number


def text(source: Source, line: int, field: str, value: Any) -> str:
    """A string that is not empty; numbers used as names are turned into text.

    Raises TraceError when it is missing or anything else.
    """
    if value is MISSING or value is None or value == "":
        raise source.error(line, field, "is missing")
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise source.error(line, field, f"'{value}' is not text")
    return value


def id_array(source: Source, line: int, field: str, value: Any, dtype: type[np.signedinteger]) -> np.ndarray:
    """A list of integers as an array: int32 token ids, which may not be negative, or int64 block ids.

    Raises TraceError when it is missing, not a list of integers, or holds one that does not fit.
    """
    if value is MISSING or value is None:
        raise source.error(line, field, "is missing")
    try:
        ids = np.array(msgspec.convert(value, list[int]), dtype=dtype)
    except msgspec.ValidationError as fault:
        raise source.error(line, field, f"is not a list of integers: {fault}") from None
    except OverflowError:
        raise source.error(line, field, f"holds an id that does not fit {np.iinfo(dtype).bits} bits") from None
    if dtype is np.int32 and len(ids) and ids.min() < 0:
        raise source.error(line, field, f"'{ids.min()}' is negative")
    return ids


def runs(source: Source, line: int, field: str, value: Any) -> np.ndarray:
    """Block ids written as runs [first, count], expanded: int64.

    Raises TraceError when the value is anything else.
    """
    if value is MISSING or value is None:
        raise source.error(line, field, "is missing")
    try:
        pairs = np.array(msgspec.convert(value, list[tuple[int, int]]), dtype=np.int64).reshape(-1, 2)
    except (msgspec.ValidationError, OverflowError) as fault:
        raise source.error(line, field, f"is not a list of [first, count] runs: {fault}") from None
    counts = pairs[:, 1]
    if len(counts) and counts.min() < 0:
        raise source.error(line, field, f"a run's count, '{counts.min()}', is negative")
    if counts.sum() > 10_000_000:
        raise source.error(line, field, f"runs of {counts.sum()} blocks in one prompt")
    ends = np.cumsum(counts)
    return np.repeat(pairs[:, 0] - (ends - counts), counts) + np.arange(counts.sum())
