"""Files as streams of lines, plain or compressed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from traces.files.errors import TraceError
from traces.files.kinds import foreign

_CHUNK_BYTES = 1 << 18
_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read, opened anew by every call."""

    path: Path
    place: str = ""
    """Place of the record that is being read, where the file is one JSON array: `[3]`. It stands in for a line."""

    def error(self, line: int, field: str, message: str) -> TraceError:
        """The error for a fault in this file."""
        if self.place:
            return TraceError(self.path, 0, f"{self.place}.{field}" if field else self.place, message)
        return TraceError(self.path, line, field, message)

    def line(self, number: int) -> int:
        """The line to say a record is on, which in an array is none."""
        return 0 if self.place else number

    def field(self, name: str) -> str:
        """A field's name as the errors have it."""
        return f"{self.place}.{name}" if self.place else name

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes, decompressed when the first bytes say gzip or zstd.

        Raises TraceError for a file that is missing, unreadable, a broken archive, or plainly no text.
        """
        chunks = self._chunks()
        first = next(chunks, b"")
        if (name := foreign(first)) is not None:
            raise self.error(0, "", f"is {name}")
        yield first
        yield from chunks

    def _chunks(self) -> Iterator[bytes]:
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise self.error(0, "", "no such file") from None
        except IsADirectoryError:
            raise self.error(0, "", "is a folder, not a trace file") from None
        except OSError as fault:
            raise self.error(0, "", f"cannot be read: {fault.strerror}") from None
        with file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(_GZIP):
                yield from self._decompressed(file, "gzip")
            elif magic == _ZSTD:
                yield from self._decompressed(file, "zstd")
            else:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk

    def _decompressed(self, file: BinaryIO, kind: str) -> Iterator[bytes]:
        """Decompress by hand: the stream readers of both libraries are slower, and zstd's takes a cut file for a whole."""
        frame = _decompressor(kind)
        try:
            while data := file.read(_CHUNK_BYTES):
                while data:
                    if frame.eof:  # Archives may be concatenated.
                        frame = _decompressor(kind)
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
        except (zlib.error, zstandard.ZstdError):
            raise self.error(0, "", f"broken {kind} archive") from None
        if not frame.eof:
            raise self.error(0, "", f"{kind} archive is cut short")

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(1-based number, line) of every line that is not blank, without its end and without a byte-order mark.

        Raises TraceError as `chunks` does.
        """
        number = 0
        pieces: list[bytes] = []  # Of a line whose end has not come yet; joined once, so that long lines stay linear.
        for chunk in self.chunks():
            *complete, rest = chunk.split(b"\n")
            if complete and pieces:
                complete[0] = b"".join([*pieces, complete[0]])
                pieces.clear()
            for line in complete:
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                line = _stripped(line)
                if line:
                    yield number, line
            if rest:
                pieces.append(rest)
        line = b"".join(pieces)
        if number == 0:
            line = line.removeprefix(_BOM)
        line = _stripped(line)
        if line:
            yield number + 1, line

    def holds(self, text: bytes) -> bool:
        """Tell whether the decompressed bytes contain `text`, reading no further than its first place."""
        overlap = b""
        for chunk in self.chunks():
            if text in overlap + chunk:
                return True
            overlap = chunk[-len(text) :]
        return False

    def sha256(self) -> str:
        """Hex digest of the bytes as they lie on disk.

        Raises TraceError when the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as fault:
            raise self.error(0, "", f"cannot be read: {fault.strerror}") from None


def _stripped(line: bytes) -> bytes:
    """Without the white space around it; a tab at the end may stand behind a last, empty cell."""
    return line.rstrip(b" \r\n").lstrip()


def _decompressor(kind: str) -> Any:
    """An object with decompress(), eof and unused_data, whatever the library."""
    return zlib.decompressobj(wbits=31) if kind == "gzip" else zstandard.ZstdDecompressor().decompressobj()
