"""The beginning of a file: what `--format auto` goes by, and what is said when nothing fits."""

from __future__ import annotations

from itertools import islice
from typing import Any

from traces.bad_rows import HINT
from traces.errors import TraceError
from traces.fields import parse_json
from traces.files import Source
from traces.formats import FORMATS, Format, Head
from traces.formats.table import columns
from traces.prefix import MOST_ITEMS
from traces.records import records

_MOST_NAMES = 30
_MOST_NEAREST = 3


def read_head(source: Source, skip_bad_rows: bool = False) -> Head:
    """The first record; with `skip_bad_rows`, the first that can be read.

    Raises TraceError when the file holds nothing, or nothing that is a record.
    """
    lines = source.lines()
    line, first = next(lines, (0, b""))
    if not line:
        raise source.error(0, "", "holds no requests: the file is empty")
    if not first.startswith((b"{", b"[")):
        return Head(columns=columns(source, line, first))
    in_array = first.startswith(b"[")
    if not in_array and _goes_on(first, next(lines, None)):
        raise source.error(
            0,
            "",
            "is one JSON object over several lines; a trace has a JSON object on each line, or is one JSON array of them "
            "(jq -c . FILE puts objects on lines)",
        )
    fault: TraceError | None = None
    for place, number, raw in islice(records(source, lambda place: None), MOST_ITEMS):
        try:
            record = parse_json(place, number, raw)
        except TraceError as raised:
            raised.hint = HINT
            if not skip_bad_rows:
                raise
            fault = fault or raised
        else:
            if _by_columns(record):
                raise source.error(
                    0,
                    "",
                    "is a table written by columns; a trace has a JSON object for each request "
                    "(pandas: to_json(..., orient='records', lines=True))",
                )
            return Head(record=record, in_array=in_array)
    if fault is not None:
        raise fault
    raise source.error(0, "", "holds no requests: the JSON array is empty")


def _goes_on(first: bytes, second: tuple[int, bytes] | None) -> bool:
    """Whether a line that begins an object does not end it, as programs write that indent."""
    return second is not None and (first == b"{" or (first.endswith(b",") and not second[1].startswith(b"{")))


def _by_columns(record: dict[str, Any]) -> bool:
    """Whether every field holds the values of all rows, as pandas writes a table unless it is told otherwise: under the
    rows' numbers."""
    values = list(record.values())
    return (
        len(values) > 1
        and all(isinstance(value, dict) and "0" in value for value in values)
        and len({tuple(value) for value in values}) == 1
    )


def unknown_format(head: Head) -> str:
    """Why a file's first record is that of no format: what it has, and what the nearest formats would need."""
    is_json = head.record is not None
    names = tuple(head.record) if head.record is not None else head.columns
    listed = ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )
    what = "fields" if is_json else "columns"
    text = f"is the start of no known format; name one with --format ({', '.join(FORMATS)}); it has "
    text += f"the {what} {listed}" if listed else f"no {what}"
    lacking = [f"{known.name} lacks {', '.join(lacks)}" for known, lacks in _nearest(names)]
    return text + (f"; nearest: {'; '.join(lacking)}" if lacking else "")


def _nearest(names: tuple[str, ...]) -> list[tuple[Format, list[str]]]:
    """Formats that need something the record has, with what they lack, those that lack least first."""
    found = []
    for known in FORMATS.values():
        lacks = [name for name in known.needs if name not in names]
        if len(lacks) < len(known.needs):
            found.append((known, lacks))
    found.sort(key=lambda pair: len(pair[1]) / len(pair[0].needs))
    return found[:_MOST_NEAREST]
