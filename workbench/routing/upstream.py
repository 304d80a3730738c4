"""The connections of a router to one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from workbench.clients.openai_client import failure_in_words
from workbench.routing.clocks import Within

Header = tuple[bytes, bytes]
IDLE_S = 2.0
"""A connection that nobody used for so long is closed: servers close theirs after 5 s, and a request must not meet that."""


class WorkerFailed(Exception):
    """A worker did not answer, or not to the end, in a few words."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a worker may take."""

    connect_s: float
    first_byte_s: float
    silence_s: float


class Reply:
    """The answer of a worker as it comes. :meth:`close` has to be called, whatever became of it."""

    def __init__(self, response: httpx2.Response, timeouts: Timeouts, within: Within) -> None:
        self._response = response
        self._timeouts = timeouts
        self._within = within
        stream: Any = response.stream
        self._pieces: AsyncIterator[bytes] = aiter(stream)
        self.status: int = response.status_code
        self.headers: Sequence[Header] = response.headers.raw

    async def next(self) -> bytes:
        """The next piece of the body; empty at its end. Raises WorkerFailed."""
        try:
            async with self._within(self._timeouts.silence_s):
                async for piece in self._pieces:
                    if piece:
                        return piece
                return b""
        except httpx2.HTTPError as error:
            raise WorkerFailed(failure_in_words(error)) from error
        except TimeoutError:
            raise WorkerFailed(f"silent for {self._timeouts.silence_s:g} s") from None

    async def rest(self, most: int) -> bytes:
        """What is left of the body, no more than about ``most`` bytes. Raises WorkerFailed."""
        pieces, size = [], 0
        while size < most and (piece := await self.next()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def header(self, name: bytes) -> bytes:
        """The value of a header; empty where it is not there."""
        return next((value for key, value in self.headers if key.lower() == name), b"")

    async def close(self) -> None:
        """Give the connection back, or close it where the answer has not been read to its end."""
        await self._response.stream.aclose()  # type: ignore[union-attr]  # an asynchronous one


class Upstream:
    """One worker by its URL."""

    def __init__(self, url: str, timeouts: Timeouts, within: Within = asyncio.timeout) -> None:
        self._url = httpx2.URL(url)
        self._prefix = self._url.raw_path.rstrip(b"/")
        self._timeouts = timeouts
        self._within = within
        self._transport = httpx2.AsyncHTTPTransport(
            verify=self._url.scheme == "https",
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S),
        )
        self._waits = httpx2.Timeout(None, connect=timeouts.connect_s).as_dict()

    async def send(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> Reply:
        """Send a request and return its answer once the headers are there. Raises WorkerFailed."""
        request = httpx2.Request(
            method,
            self._url.copy_with(raw_path=self._prefix + target),
            headers=list(headers),
            content=body or None,
            extensions={"timeout": self._waits},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise WorkerFailed(failure_in_words(error, self._timeouts.connect_s)) from error
        return Reply(response, self._timeouts, self._within)

    async def begin(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> tuple[Reply, bytes]:
        """Send a request, and return its answer with the first piece of its body. Raises WorkerFailed."""
        reply = None
        try:
            async with self._within(self._timeouts.first_byte_s):
                reply = await self.send(method, target, headers, body)
                return reply, await reply.next()
        except BaseException as error:
            if reply is not None:
                await reply.close()
            if isinstance(error, TimeoutError):
                raise WorkerFailed(f"no answer within {self._timeouts.first_byte_s:g} s") from None
            raise

    async def fetch(
        self, method: str, path: str, headers: Sequence[Header], body: bytes, within_s: float, most: int = 1 << 20
    ) -> tuple[int, bytes]:
        """Status and body of a short answer. Raises WorkerFailed."""
        try:
            async with self._within(within_s):
                reply = await self.send(method, path.encode(), headers, body)
                try:
                    return reply.status, await reply.rest(most)
                finally:
                    await reply.close()
        except TimeoutError:
            raise WorkerFailed(f"no answer within {within_s:g} s") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.aclose()
