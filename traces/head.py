"""The beginning of a file: what `--format auto` goes by, and what is said when nothing fits."""

from __future__ import annotations

from itertools import islice
from typing import Any

from traces.files.bad_rows import HINT
from traces.files.csv_rows import columns
from traces.files.errors import TraceError
from traces.files.json_records import records
from traces.files.look_ahead import MOST_ITEMS
from traces.files.source import Source
from traces.files.values import parse_json
from traces.formats import FORMATS, Format, Head

_MOST_NAMES = 30
_MOST_NEAREST = 3
_TABLE_KEYS = ({"columns", "data"}, {"columns", "index", "data"}, {"schema", "data"})
"""Keys of pandas' orients split and table."""
_LISTS = frozenset({"prompt_token_ids", "output_token_ids", "hash_ids", "messages"})
"""Fields of a request that are lists."""


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
            if (table := _table_in(record)) is not None:
                raise source.error(
                    0,
                    "",
                    f"is a table written {table}; a trace has a JSON object for each request "
                    "(pandas: to_json(..., orient='records', lines=True))",
                )
            return Head(record=record, in_array=in_array)
    if fault is not None:
        raise fault
    raise source.error(0, "", "holds no requests: the JSON array is empty")


def _goes_on(first: bytes, second: tuple[int, bytes] | None) -> bool:
    """Tell whether a line begins an object that goes on below, as programs write that indent."""
    return second is not None and (first == b"{" or (first.endswith(b",") and not second[1].startswith(b"{")))


def _table_in(record: dict[str, Any]) -> str | None:
    """Recognise a whole table in one JSON object, as pandas writes it unless told otherwise; None if there is none."""
    if record.keys() in _TABLE_KEYS:
        return "as one object"
    values = list(record.values())
    if len(values) < 2:
        return None
    if all(isinstance(value, dict) for value in values) and len({tuple(value) for value in values}) == 1:
        return (
            "by rows under their numbers" if list(record) == [str(row) for row in range(len(record))] else "by columns"
        )
    if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return "by columns" if record.keys().isdisjoint(_LISTS) else None
    return None


def unknown_format(head: Head) -> str:
    """Say why a file's first record is that of no format: what it has, and what the nearest formats would need."""
    is_json = head.record is not None
    names = head.names
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
