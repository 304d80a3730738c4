"""One connection to a worker, on h11. What has come at once is one piece, so that a router that is behind catches up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import h11

from workbench.serving.http.errors import ApiError

Header = tuple[bytes, bytes]
READ_AHEAD_BYTES = 1 << 16
"""No more is read from a worker while so much waits for the client."""
MOST_HEADER_BYTES = 1 << 16
LAST_STATUS = 599


class WorkerFailed(Exception):
    """A worker did not answer, or not to the end, in a few words."""


class NotSendable(ApiError):
    """A request that HTTP cannot carry: the client's fault, and no worker's."""

    def __init__(self, why: object) -> None:
        super().__init__(400, f"the request cannot be sent: {why}")


class Connection(asyncio.Protocol):
    """Requests and answers one after the other. Raises WorkerFailed for whatever a worker should not do."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEADER_BYTES)
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._unread = 0
        self._paused = False
        self._over = False

    # -- what the loop says ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._h11.receive_data(data)
        self._unread += len(data)
        if self._unread > READ_AHEAD_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over and error is None:
            self._h11.receive_data(b"")  # which ends an answer that has no length
        self._over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what a request needs --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether it can take a request."""
        return not self._over and self._h11.our_state is h11.IDLE and not self._unread

    def send(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> None:
        """Send a request, whose ``headers`` say how long its body is. Raises NotSendable."""
        try:
            said = self._h11.send(h11.Request(method=method, target=target, headers=list(headers))) or b""
            said += (self._h11.send(h11.Data(data=body)) or b"") if body else b""
            said += self._h11.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise NotSendable(error) from error
        self._transport.write(said)

    async def answer(self) -> h11.Response:
        """Status and headers of the answer."""
        while True:
            event = self._next_event()
            if isinstance(event, h11.Response):
                if event.status_code > LAST_STATUS:
                    raise WorkerFailed(f"its answer is not HTTP: status {event.status_code}")
                return event
            if event is h11.NEED_DATA:
                await self._more()
            elif not isinstance(event, h11.InformationalResponse):
                raise WorkerFailed("closed the connection without an answer")

    def piece(self) -> bytes | None:
        """What has come of the body, if anything has; empty at its end."""
        pieces = []
        while isinstance(event := self._next_event(), h11.Data):
            pieces.append(bytes(event.data))
        if pieces:
            return b"".join(pieces)
        if event is h11.NEED_DATA:
            return None
        return b""  # the end, which h11 says once: what comes after it is of another answer

    async def more(self) -> None:
        """Wait until more has come, or the connection is over."""
        await self._more()

    def _next_event(self) -> object:
        if self._h11.their_state is h11.DONE:
            return h11.EndOfMessage()
        try:
            event = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            if self._over:
                raise WorkerFailed("closed the connection before the end of its answer") from error
            raise WorkerFailed(f"its answer is not HTTP: {error}") from error
        if event is h11.NEED_DATA:
            self._unread = 0
            if self._over:
                raise WorkerFailed("closed the connection before the end of its answer")
        return event

    async def _more(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def next_request(self) -> bool:
        """Get ready for another request; tells whether that can be."""
        if self._over or self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        if self._h11.trailing_data[0]:
            return False
        self._h11.start_next_cycle()
        self._unread = 0
        return True

    def close(self) -> None:
        """Cut it."""
        self._over = True
        self._transport.abort()
