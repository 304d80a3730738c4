"""JSON records: one a line, or the elements of one array."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import msgspec

from traces.files.source import Source
from traces.files.values import json_fault

_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
"""An escape in a JSON string. The group: half of a surrogate pair without its other half."""
_BOM = b"\xef\xbb\xbf"

Mended = Callable[[str], None]
"""Told of a record whose text had characters that are none, by its place in the file."""


def records(source: Source, mended: Mended) -> Iterator[tuple[Source, int, bytes]]:
    """(source that names the record's place in its errors, 1-based number, the record's bytes) of every record.

    A file that begins with `[` is one JSON array and read whole; its elements are numbered. Any other is read line by line.
    Halves of surrogate pairs, which other programs write and which are no characters, become U+FFFD.

    Raises TraceError for an array that is none.
    """
    lines = source.lines()
    first = next(lines, None)
    if first is None:
        return
    if not first[1].startswith(b"["):
        for number, line in chain((first,), lines):
            yield source, number, line if b"\\u" not in line else _whole(line, f"line {number}", mended)
        return
    del lines, first
    for number, element in enumerate(_elements(source)):
        place = f"[{number}]"
        yield replace(source, place=place), number + 1, _whole(element, place, mended)


def _elements(source: Source) -> Iterator[bytes]:
    """The elements of an array. They stay views of the file's bytes until their turn comes."""
    raw = b"".join(source.chunks()).removeprefix(_BOM)
    try:
        elements = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        if not _lone(raw):
            raise source.error(0, "", _array_fault(raw, fault)) from None
    else:
        del raw
        yield from map(bytes, elements)
        return
    # A broken character anywhere in it looks to the parser like an array without an end.
    try:
        marked = msgspec.json.decode(_ESCAPE.sub(_marked, raw), type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise source.error(0, "", _array_fault(raw, fault)) from None
    del raw
    for element in marked:
        yield bytes(element).replace(_MARK, rb"\ud800")


_MARK = rb"\uffff\uffffLONE\uffff"
"""Stands for half a pair while an array is cut into its elements."""


def _marked(found: re.Match[bytes]) -> bytes:
    return _MARK if found[1] else found[0]


def _array_fault(raw: bytes, fault: Exception) -> str:
    if "truncated" in str(fault):
        return "the JSON array has no end: the file is cut short"
    lines = raw.lstrip()[1:].split(b"\n", 2)
    if len(lines) > 1 and lines[1].lstrip().startswith(b"["):
        return "has a JSON array on each line: a trace has a JSON object on each, or is one array of objects"
    return f"not a JSON array: {json_fault(raw, fault).removeprefix('not valid JSON: ')}"


def _whole(record: bytes, place: str, mended: Mended) -> bytes:
    if not _lone(record):
        return record
    mended(place)
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found[1] else found[0], record)


def _lone(raw: bytes) -> bool:
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return False
    return any(found[1] for found in _ESCAPE.finditer(raw))
