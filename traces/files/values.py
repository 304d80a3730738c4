"""Checks of single values: each takes what the file says, and returns it typed or raises the one-line error."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np

from traces.files.errors import TraceError
from traces.files.source import Source

MISSING: Any = object()
"""Stands for a field the record does not have."""
MOST_TOKENS = 100_000_000
"""Most tokens of a request, far beyond any model's context: a longer one is a mistake and would fill the memory."""
MOST = 1 << 53
"""Largest whole number: up to here they are exact everywhere a record takes them."""
MOST_TIME = 10**19
"""Largest time, in a file's own unit: nanoseconds since 1970, until 2286."""
_TOO_LARGE = "larger than any number here may be"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?", re.ASCII)
"""A number as CSV writers have it: 18, 18.0, +18, 1.8e1. Without thousands separators: 1,024 may be one or a thousand."""


def parse_json(source: Source, line: int, text: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises TraceError when it is not JSON, or not an object.
    """
    try:
        record = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise source.error(line, "", json_fault(text, fault)) from None
    if not isinstance(record, dict):
        raise source.error(line, "", "is not a JSON object")
    return record


def json_fault(text: bytes, fault: Exception) -> str:
    """Say what is wrong with bytes that are no JSON, in words for someone who did not write the parser."""
    if isinstance(fault, UnicodeDecodeError) or "utf-8" in str(fault).lower():
        return "is not UTF-8 text"
    if "truncated" in str(fault):
        return f"the JSON {'list' if text.startswith(b'[') else 'object'} has no end"
    return f"not valid JSON: {fault}"


def integer(source: Source, line: int, field: str, value: Any) -> int:
    """A whole number in any notation: 18, 18.0, 1.8e1, and as text, as CSV has it.

    Raises TraceError when it is missing or not a whole number.
    """
    if type(value) is int:
        number: int | None = value
    elif type(value) is str and value.isascii() and value.isdigit() and len(value) < 40:
        number = int(value)
    else:
        if _is_missing(value):
            raise source.error(line, field, "is missing")
        number = _whole(value)
    if number is None:
        raise source.error(line, field, f"'{value}' is not an integer")
    if not -MOST <= number <= MOST:
        raise source.error(line, field, f"'{value}' is {_TOO_LARGE}")
    return number


def flag(source: Source, line: int, field: str, value: Any) -> bool:
    """true or false. Raises TraceError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise source.error(line, field, f"'{value}' is neither true nor false")
    return bool(value)


def _is_missing(value: Any) -> bool:
    return value is MISSING or value is None or (isinstance(value, str) and not value.strip())


def _whole(value: Any) -> int | None:
    """The whole number that a value stands for, or None. Far beyond 64 bits any number as large will do."""
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text) is None:
            return None
        number = Decimal(text)
        if number and number.adjusted() >= 40:
            return 10**40
        return int(number) if number == number.to_integral_value() else None
    if type(value) is float and math.isfinite(value) and value == math.floor(value):
        return int(value)
    return None


def length(source: Source, line: int, field: str, value: Any, most: int = MOST_TOKENS) -> int:
    """A number of tokens, from 1 to `most`.

    Raises TraceError when it is not.
    """
    number = value if type(value) is int else integer(source, line, field, value)
    if 0 < number <= most:
        return number
    if number == 0:
        raise source.error(line, field, "is 0; a request has at least 1 token")
    return count(source, line, field, value, most)  # which says what is wrong


def count(source: Source, line: int, field: str, value: Any, most: int = MOST_TOKENS) -> int:
    """A number of tokens or turns, from 0 to `most`.

    Raises TraceError when it is not.
    """
    number = integer(source, line, field, value)
    if not 0 <= number <= most:
        too_large = f"more than the {most:,} tokens a request may have"
        raise _out_of_range(source, line, field, value, number, too_large)
    return number


def seconds(source: Source, line: int, field: str, value: Any) -> float:
    """A time or duration that is finite and not negative, in the file's own unit; text is parsed.

    Raises TraceError when it is not.
    """
    if type(value) is float and 0 <= value <= MOST_TIME:
        return value
    number = decimal(source, line, field, value)
    if not 0 <= number <= MOST_TIME:
        raise _out_of_range(source, line, field, value, number, _TOO_LARGE)
    return number


def _out_of_range(source: Source, line: int, field: str, value: Any, number: float, too_large: str) -> TraceError:
    return source.error(line, field, f"'{value}' is {'negative' if number < 0 else too_large}")


def decimal(source: Source, line: int, field: str, value: Any) -> float:
    """A finite number of either sign; text is parsed.

    Raises TraceError when it is not.
    """
    if type(value) is float:
        number = value
    elif isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        number = float(value)
    elif type(value) is int:
        number = float(value) if abs(value) < 1 << 1000 else math.inf
    elif _is_missing(value):
        raise source.error(line, field, "is missing")
    else:
        number = math.nan
    if not math.isfinite(number):
        raise source.error(line, field, f"'{value}' is not a finite number")
    return number


def text(source: Source, line: int, field: str, value: Any) -> str:
    """A string that is not empty; whole numbers used as names are turned into text, 18.0 as 18.

    Raises TraceError when it is missing or anything else.
    """
    if value is MISSING or value is None or value == "":
        raise source.error(line, field, "is missing")
    if isinstance(value, str):
        return value
    number = value if type(value) is int else _whole(value)
    if number is None:
        raise source.error(line, field, f"'{value}' is not text")
    return str(number)


def id_array(source: Source, line: int, field: str, value: Any, dtype: type[np.signedinteger]) -> np.ndarray:
    """A list of whole numbers as an array: int32 token ids, which may not be negative, or int64 block ids.

    Raises TraceError when it is missing, not a list of whole numbers, or holds one that does not fit.
    """
    if value is MISSING or value is None:
        raise source.error(line, field, "is missing")
    numbers = whole_numbers(source, line, field, value)
    try:
        if dtype is np.int64 and numbers and max(numbers) >= 1 << 63:  # Hashes are often unsigned: they stay different.
            return np.array(numbers, dtype=np.uint64).astype(np.int64)
        ids = np.array(numbers, dtype=dtype)
    except OverflowError:
        raise source.error(line, field, f"holds an id that does not fit {np.iinfo(dtype).bits} bits") from None
    if dtype is np.int32 and len(ids) and ids.min() < 0:
        raise source.error(line, field, f"'{ids.min()}' is negative")
    return ids


def whole_numbers(source: Source, line: int, field: str, value: Any) -> list[int]:
    """A list of whole numbers of any size, in any notation.

    Raises TraceError when it is anything else.
    """
    try:
        return msgspec.convert(value, list[int])
    except msgspec.ValidationError as fault:
        if not isinstance(value, list):
            raise source.error(line, field, f"is not a list of integers: {fault}") from None
    numbers = [item if type(item) is int else _whole(item) for item in value]
    for place, number in enumerate(numbers):
        if number is None:
            raise source.error(line, field, f"is not a list of integers: '{value[place]}' at place {place}")
    return numbers  # type: ignore[return-value]  # there is no None among them


def runs(source: Source, line: int, field: str, value: Any) -> np.ndarray:
    """Block ids written as runs [first, count], expanded: int64.

    Raises TraceError when the value is anything else.
    """
    if value is MISSING or value is None:
        raise source.error(line, field, "is missing")
    try:
        pairs = np.array(_pairs(source, line, field, value), dtype=np.int64).reshape(-1, 2)
    except (msgspec.ValidationError, OverflowError) as fault:
        raise source.error(line, field, f"is not a list of [first, count] runs: {fault}") from None
    counts = pairs[:, 1]
    if len(counts) and counts.min() < 0:
        raise source.error(line, field, f"a run's count, '{counts.min()}', is negative")
    if counts.sum() > 10_000_000:
        raise source.error(line, field, f"runs of {counts.sum()} blocks in one prompt")
    ends = np.cumsum(counts)
    return np.repeat(pairs[:, 0] - (ends - counts), counts) + np.arange(counts.sum())


def _pairs(source: Source, line: int, field: str, value: Any) -> list[Any]:
    try:
        return msgspec.convert(value, list[tuple[int, int]])
    except msgspec.ValidationError:
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise
    return [whole_numbers(source, line, field, pair) for pair in value]
