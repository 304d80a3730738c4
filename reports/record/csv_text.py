"""Columns to CSV text and back, fast and the same bytes every time.

Arrow turns a whole column into strings at once, and joining the columns row by row leaves the finished text of the file
in the buffer of one Arrow array. That is about as fast as Arrow's own CSV writer and, unlike it, decides how a number
looks: whole numbers without a point, seconds as the shortest decimals that read back to the same float, never as 5e-06.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from reports.record.errors import RecordError
from reports.record.plain_csv import plain_lines
from reports.record.schema import MODES, TIMES_OF_EVERY_LINE, Kind

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_A_TIME = 1 << 15
_PARTS_AT_A_TIME = 2
_NS_PER_S = 1_000_000_000
_PLAIN_FROM_S = 1e-5
"""Arrow writes smaller floats with an exponent."""


def write_columns(columns: Mapping[str, np.ndarray | Sequence[str]], kinds: Mapping[str, Kind], file: BinaryIO) -> None:
    """Write `columns`, all of one length and of the kinds given, as CSV with a header line. Without Arrow the bytes are the
    same and take longer."""
    file.write((",".join(columns) + "\n").encode())
    rows = len(next(iter(columns.values())))
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        for first in range(0, rows, _ROWS_AT_A_TIME):
            part = slice(first, first + _ROWS_AT_A_TIME)
            file.write(plain_lines({name: values[part] for name, values in columns.items()}, kinds))
        return

    def lines(first: int) -> memoryview:
        part = slice(first, first + _ROWS_AT_A_TIME)
        return _lines([_text(values[part], kinds[name]) for name, values in columns.items()])

    # Arrow works without the interpreter's lock. A few parts at a time: all of a long run's text would fill the memory.
    with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
        for first in range(0, rows, _PARTS_AT_A_TIME * _ROWS_AT_A_TIME):
            last = min(first + _PARTS_AT_A_TIME * _ROWS_AT_A_TIME, rows)
            for text in pool.map(lines, range(first, last, _ROWS_AT_A_TIME)):
                file.write(text)


def _lines(texts: list[pyarrow.Array]) -> memoryview:
    import pyarrow.compute as compute

    comma, end, nothing = _strings([",", "\n", ""])
    joined = compute.binary_join_element_wise(*texts, comma, null_handling="replace", null_replacement="")
    ended = compute.binary_join_element_wise(joined, end, nothing)
    _, offsets, data = ended.buffers()
    length = np.frombuffer(offsets, dtype=np.int32)[len(ended)]  # the buffer itself may be padded
    return memoryview(data)[:length]


def _text(values: Any, kind: Kind) -> pyarrow.Array:
    import pyarrow

    if kind is Kind.TEXT:
        return _quoted(_strings(values))
    if kind is Kind.MODE:
        return _strings(MODES).take(_numbers(values))
    if kind is Kind.TIME:
        return _seconds(values)
    return _numbers(values).cast(pyarrow.string())


# Arrow's own array() and scalar() import pandas before anything else, which takes a third of a second.


def _strings(values: Sequence[str]) -> pyarrow.StringArray:
    import pyarrow

    encoded = [value.encode() for value in values]
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), np.int32, len(encoded) + 1)
    return pyarrow.StringArray.from_buffers(
        len(encoded), pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(encoded))
    )


def _numbers(values: np.ndarray) -> pyarrow.Array:
    """Whole numbers, truth values and floats; NaN is null."""
    import pyarrow

    values = np.ascontiguousarray(values)
    valid = None
    if values.dtype.kind == "f" and (unknown := np.isnan(values)).any():
        valid = pyarrow.py_buffer(np.packbits(~unknown, bitorder="little"))
    data = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else values
    return pyarrow.Array.from_buffers(
        pyarrow.from_numpy_dtype(values.dtype), len(values), [valid, pyarrow.py_buffer(data)]
    )


def _seconds(values_s: np.ndarray) -> pyarrow.Array:
    import pyarrow
    import pyarrow.compute as compute

    texts = _numbers(values_s).cast(pyarrow.string())
    tiny = (np.abs(values_s) < _PLAIN_FROM_S) & (values_s != 0)
    if tiny.any():
        # On a grid of nanoseconds only a few thousand different times are this small: spell those out.
        nanoseconds, place = np.unique(np.rint(values_s[tiny] * _NS_PER_S).astype(np.int64), return_inverse=True)
        spelled = _strings([f"{ns / _NS_PER_S:.9f}".rstrip("0") for ns in nanoseconds.tolist()])
        texts = compute.replace_with_mask(texts, _numbers(tiny), spelled.take(_numbers(place)))
    return texts


def _quoted(texts: pyarrow.Array) -> pyarrow.Array:
    import pyarrow.compute as compute

    special = compute.match_substring_regex(texts, '[",\r\n]')
    if not compute.any(special).as_py():
        return texts
    doubled = compute.replace_substring(texts, '"', '""')
    quote, nothing = _strings(['"', ""])
    return compute.if_else(special, compute.binary_join_element_wise(quote, doubled, quote, nothing), texts)


_MOST = {Kind.TIME: 4_000_000_000, Kind.NUMBER: 1 << 53, Kind.INT: 1 << 51}
"""Nanoseconds and differences of them fit 64 bits, until 2096 if they are since 1970. Whole numbers and differences of them
are exact as floats, in the page's scripts, too."""


def read_columns(path: Path, kinds: Mapping[str, Kind], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read the columns named in `kinds`; others in the file are left out, `optional` ones may be missing.

    Raises `RecordError` for a missing column or a value of the wrong kind, with line and column.
    """
    import pyarrow
    import pyarrow.csv

    names = _header(path)
    missing = [name for name in kinds if name not in names and name not in optional]
    if missing:
        raise RecordError(f"{path}: line 1: no column {', '.join(missing)}")
    here = {name: kind for name, kind in kinds.items() if name in names}
    types = {Kind.TEXT: pyarrow.string(), Kind.MODE: pyarrow.string(), Kind.INT: pyarrow.int64()}
    options = pyarrow.csv.ConvertOptions(
        include_columns=list(here),
        column_types={name: types.get(kind, pyarrow.float64()) for name, kind in here.items()},
        null_values=[""],
        strings_can_be_null=False,
        quoted_strings_can_be_null=False,
    )
    try:
        table = pyarrow.csv.read_csv(
            path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True), convert_options=options
        )
    except pyarrow.ArrowInvalid as problem:
        raise _located(path, here) or RecordError(f"{path}: {str(problem).splitlines()[0]}") from None
    columns: dict[str, Any] = {}
    for name, kind in here.items():
        column = table.column(name)
        if kind is Kind.TEXT:
            columns[name] = column.to_pylist()
        elif kind is Kind.MODE:
            codes = pyarrow.compute.index_in(column, pyarrow.array(MODES))
            if codes.null_count:
                raise _located(path, here) or RecordError(f"{path}: column {name}: not one of {', '.join(MODES)}")
            columns[name] = codes.to_numpy().astype(np.int8)
        elif kind is Kind.INT and column.null_count:
            raise _located(path, here) or RecordError(f"{path}: column {name}: a value is missing")
        else:
            values = columns[name] = column.to_numpy()
            known = values == values
            if (name in TIMES_OF_EVERY_LINE and not known.all()) or (np.abs(values[known]) > _MOST[kind]).any():
                raise _located(path, here) or RecordError(f"{path}: column {name}: a value is missing or too large")
    return columns


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError) as problem:
        raise RecordError(f"{path}: cannot be read: {problem}") from None


def _located(path: Path, kinds: Mapping[str, Kind]) -> RecordError | None:
    """The first value that is not of its column's kind: slow, so asked only once something is known to be wrong."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        names = next(reader)
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if len(row) != len(names):
                return RecordError(f"{where}: {len(row)} values where the header has {len(names)}")
            for name, text in zip(names, row, strict=True):
                wanted = _complaint(name, text, kinds.get(name, Kind.TEXT))
                if wanted:
                    return RecordError(f"{where}, column {name}: {text!r} is not {wanted}")
    return None


def _complaint(name: str, text: str, kind: Kind) -> str:
    number = 0.0
    try:
        if kind is Kind.INT:
            number = int(text)
        elif kind in (Kind.TIME, Kind.NUMBER):
            number = float(text or "nan")
        elif kind is Kind.MODE and text not in MODES:
            return f"one of {', '.join(MODES)}"
    except ValueError:
        return "a whole number" if kind is Kind.INT else "a number"
    if kind in _MOST and abs(number) > _MOST[kind]:
        return f"within what a record holds (at most {_MOST[kind]:,})"
    return "a time" if name in TIMES_OF_EVERY_LINE and number != number else ""
