"""Server-sent events out of the bytes of an answer, as real servers write them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass

import msgspec

_decode = msgspec.json.Decoder().decode
DONE = b"[DONE]"
"""The last event of a stream that ended as it should."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its name (empty where it has none) and its data."""

    name: str
    data: bytes


async def events(blocks: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    """The events of a stream, however it was cut into blocks. What the stream ends in is an event too, for not everybody
    writes the last empty line."""
    lines = Lines()
    parser = Parser()
    async for block in blocks:
        for line in lines.add(block):
            for event in parser.line(line):
                yield event
    for line in lines.rest():
        for event in parser.line(line):
            yield event
    for event in parser.end():
        yield event


class Lines:
    """Bytes into lines that end in LF, CR or CRLF; characters of several bytes have none of them in the middle."""

    def __init__(self) -> None:
        self._open = b""

    def add(self, block: bytes) -> list[bytes]:
        """The lines that are whole now."""
        text = self._open + block
        if b"\r" in text:
            # A CR at the very end may be half of a CRLF.
            held = text.endswith(b"\r")
            text = text[: -1 if held else None].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + (b"\r" if held else b"")
        *whole, self._open = text.split(b"\n")
        return whole

    def rest(self) -> list[bytes]:
        """Return what is left when the stream has ended."""
        return [self._open.rstrip(b"\r")] if self._open else []


class Parser:
    """Lines into events: data of several lines is one text, comments and other fields say nothing."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[bytes] = []

    def line(self, line: bytes) -> Iterator[Event]:
        """Return what a line brings to an end."""
        if not line:
            yield from self.end()
            return
        field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            self._name = value.decode(errors="replace").strip()
        elif field == b"data":
            # Some write no empty line between events: what is whole already is not gone on with.
            if self._data and _whole(b"\n".join(self._data)):
                yield from self.end()
            self._data.append(value)

    def end(self) -> Iterator[Event]:
        """The event that has been read, if there is one."""
        if self._data:
            yield Event(self._name, b"\n".join(self._data).strip())
        self._name, self._data = "", []


def _whole(data: bytes) -> bool:
    if data.strip() == DONE:
        return True
    try:
        _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
