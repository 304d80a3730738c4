"""Requests into a file of our own format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import zstandard

from traces.files.errors import TraceError
from traces.requests.content import TokenIds
from traces.requests.trace_request import TraceRequest

_ENCODER = msgspec.json.Encoder()


def write_trace(requests: Iterable[TraceRequest], path: str | Path, force: bool = False) -> int:
    """Write requests as JSON lines, compressed when the name ends in .gz or .zst; returns how many.

    The file appears whole or not at all. What requests share is kept: as token ids where there are some, else as block ids.

    Raises TraceError when the file exists (unless `force`) or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise TraceError(path, 0, "", "is a folder, not a trace file")
    if path.exists() and not force:
        raise TraceError(path, 0, "", "exists; --force overwrites it")
    written = 0
    with _replacing(path) as file:
        buffer = bytearray()
        for request in requests:
            buffer += json_line(request)
            written += 1
            if len(buffer) > 1 << 20:
                file.write(buffer)
                buffer.clear()
        file.write(buffer)
    return written


def json_line(request: TraceRequest) -> bytes:
    """A request's line, with its end."""
    return _ENCODER.encode(record_of(request)) + b"\n"


def record_of(request: TraceRequest) -> dict[str, Any]:
    """The JSON object of one line; fields at their defaults are left out."""
    record: dict[str, Any] = {"request_id": request.request_id}
    if request.arrival_s is not None:
        record["arrival_s"] = request.arrival_s
    content = request.content
    if isinstance(content, TokenIds):
        record["prompt_token_ids"] = content.prompt.tolist()
    else:
        record["input_length"] = request.input_length
        if content.blocks is not None and not content.inherited:
            blocks = content.blocks
            needed = -(-(request.input_length + request.output_length) // blocks.size)
            record["hash_ids"] = blocks.ids[:needed].tolist()
            record["block_size"] = blocks.size
            if blocks.scope:
                record["hash_scope"] = blocks.scope
    record["output_length"] = request.output_length
    if isinstance(content, TokenIds) and content.output is not None:
        record["output_token_ids"] = content.output.tolist()
    if request.session_id is not None:
        record["session_id"] = request.session_id
        record["turn"] = request.turn
    for field, default in (
        ("max_tokens", None),
        ("think_time_s", 0.0),
        ("priority", 0),
        ("adapter", None),
        ("slo_ttft_s", None),
        ("slo_tpot_s", None),
        ("constrained", False),
    ):
        value = getattr(request, field)
        if value != default:
            record[field] = value
    return record


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes `path`'s place when all went well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as fault:
        raise TraceError(path, 0, "", f"cannot be written: {fault.strerror}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as raw, _compressed(raw, path.suffix) as file:
            yield file
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files.
        temporary.replace(path)
    except OSError as fault:
        raise TraceError(path, 0, "", f"cannot be written: {fault.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _compressed(raw: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    """`raw`, or a stream that compresses into it; the same requests give the same bytes."""
    if suffix == ".gz":
        import gzip

        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
            yield cast(IO[bytes], file)
    elif suffix == ".zst":
        with zstandard.ZstdCompressor(level=9).stream_writer(raw, closefd=False) as file:
            yield cast(IO[bytes], file)
    else:
        yield raw


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
