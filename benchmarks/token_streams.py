"""Streamed completions as a client of few calls reads them, and the servers they come from: for router.py and streams.py."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-3.1-8b"
_MAIN = "from workbench.cli.main import main; main()"
_MARK = b"data: {"


class Stream(asyncio.Protocol):
    """One request on a connection of its own, and when its tokens came."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._before = b""
        """The end of what came, in which a mark may have begun."""
        self.sent_s = float("nan")
        self.at_s: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.sent_s = time.perf_counter()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        transport.write(head + b"Content-Length: %d\r\n\r\n" % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        data = self._before + data
        self.at_s += [time.perf_counter()] * data.count(_MARK)
        self._before = data[1 - len(_MARK) :]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(error)


async def stream(url: str, asked: Mapping[str, Any]) -> Stream:
    """Ask a server for a completion of ``max_tokens`` tokens, and read all of it.

    Raises RuntimeError where not as many came.
    """
    at, body = urlsplit(url), json.dumps({**asked, "stream": True}).encode()
    _, found = await asyncio.get_running_loop().create_connection(lambda: Stream(body), at.hostname, at.port)
    error = await found.ended
    if len(found.at_s) != asked["max_tokens"]:
        raise RuntimeError(f"{len(found.at_s)} of {asked['max_tokens']} tokens came: {error or 'the stream ended'}")
    return found


def started(*words: str, tree: Path = ROOT) -> tuple[subprocess.Popen[str], str]:
    """A command of the checkout ``tree`` that says its address in its first line, and that address.

    Raises SystemExit where it does not say one.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *words],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"on (http://[^\s,]+)", line)
    if found is None:
        process.terminate()
        raise SystemExit(f"it did not start: {' '.join(words)}: {line}")
    return process, found[1]
