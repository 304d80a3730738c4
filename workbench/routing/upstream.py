"""The connections of a router to one worker."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from workbench.routing.clocks import Within
from workbench.routing.connection import Connection, Header, WorkerFailed

IDLE_S = 2.0
"""A connection that nobody used for so long is closed: servers close theirs after 5 s, and a request must not meet that."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a worker may take."""

    connect_s: float
    first_byte_s: float
    silence_s: float


class Reply:
    """The answer of a worker as it comes. :meth:`close` has to be called, whatever became of it."""

    def __init__(
        self, status: int, headers: Sequence[Header], connection: Connection, upstream: Upstream, silence_s: float
    ) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self._upstream = upstream
        self._silence_s = silence_s
        self._closed = False

    async def next(self) -> bytes:
        """The next piece of the body; empty at its end. Raises WorkerFailed."""
        while (piece := self._connection.piece()) is None:
            try:
                async with self._upstream.within(self._silence_s):
                    await self._connection.more()
            except TimeoutError:
                raise WorkerFailed(f"silent for {self._silence_s:g} s") from None
        return piece

    async def rest(self, most: int) -> bytes:
        """What is left of the body, no more than about ``most`` bytes. Raises WorkerFailed."""
        pieces, size = [], 0
        while size < most and (piece := await self.next()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def header(self, name: bytes) -> bytes:
        """The value of a header; empty where it is not there."""
        return next((value for key, value in self.headers if key == name), b"")

    def close(self) -> None:
        """Give the connection back, or close it where the answer has not been read to its end."""
        if not self._closed:
            self._closed = True
            self._upstream.done_with(self._connection)


class Upstream:
    """One worker by its URL."""

    def __init__(self, url: str, timeouts: Timeouts, within: Within = asyncio.timeout) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").encode()
        self._name = parts.netloc.encode()
        self._timeouts = timeouts
        self.within = within
        self._idle: list[tuple[Connection, asyncio.TimerHandle]] = []
        self._closed = False

    async def send(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> Reply:
        """Send a request and return its answer once the headers are there. Raises WorkerFailed."""
        framing = [(b"content-length", str(len(body)).encode())] if body or method != "GET" else []
        connection = self._take_idle() or await self._connect()
        try:
            connection.send(method, self._prefix + target, [(b"host", self._name), *headers, *framing], body)
            answer = await connection.answer()
        except BaseException:
            connection.close()
            raise
        return Reply(answer.status_code, answer.headers, connection, self, self._timeouts.silence_s)

    async def begin(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> tuple[Reply, bytes]:
        """Send a request, and return its answer with the first piece of its body. Raises WorkerFailed."""
        reply = None
        try:
            async with self.within(self._timeouts.first_byte_s):
                reply = await self.send(method, target, headers, body)
                return reply, await reply.next()
        except BaseException as error:
            if reply is not None:
                reply.close()
            if isinstance(error, TimeoutError):
                raise WorkerFailed(f"no answer within {self._timeouts.first_byte_s:g} s") from None
            raise

    async def fetch(
        self, method: str, path: str, headers: Sequence[Header], body: bytes, within_s: float, most: int = 1 << 20
    ) -> tuple[int, bytes]:
        """Status and body of a short answer. Raises WorkerFailed."""
        try:
            async with self.within(within_s):
                reply = await self.send(method, path.encode(), headers, body)
                try:
                    return reply.status, await reply.rest(most)
                finally:
                    reply.close()
        except TimeoutError:
            raise WorkerFailed(f"no answer within {within_s:g} s") from None

    def done_with(self, connection: Connection) -> None:
        """Keep a connection for the next request, if it can have one."""
        if self._closed or not connection.next_request():
            connection.close()
            return
        expires = asyncio.get_running_loop().call_later(IDLE_S, self._expire, connection)
        self._idle.append((connection, expires))

    def close(self) -> None:
        """Close the connections that nobody uses, and others when they are done with."""
        self._closed = True
        while self._idle:
            connection, expires = self._idle.pop()
            expires.cancel()
            connection.close()

    def _expire(self, connection: Connection) -> None:
        self._idle = [each for each in self._idle if each[0] is not connection]
        connection.close()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection, expires = self._idle.pop()
            expires.cancel()
            if connection.ready:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with self.within(self._timeouts.connect_s):
                _, made = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise WorkerFailed(f"no connection within {self._timeouts.connect_s:g} s") from None
        except OSError as error:
            why = os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else error.strerror
            raise WorkerFailed(f"cannot be reached ({why or error})") from error
        except UnicodeError as error:  # of a name that is none
            raise WorkerFailed("cannot be reached (there is no such name)") from error
        return made


def object_in(body: bytes) -> dict[str, Any]:
    """The object that an answer in JSON is; an empty one where it is none."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
