"""One attempt at a request at a pair: it goes to a prefill and a decode worker, which meet by the number of a room."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.routing.attempts import AttemptFailed, Passed, PlainAttempt, Told
from workbench.routing.connection import Header
from workbench.routing.dispatch import Sending
from workbench.routing.upstream import Reply
from workbench.routing.worker import Worker
from workbench.serving.http.request_headers import MOST_ROOM, PEER, ROOM, ROUTER


@dataclass
class Rooms:
    """Numbers of rooms, each given once. Another router, and this one when it starts again, has another name."""

    router: str = field(default_factory=lambda: uuid.uuid4().hex)
    _next: int = field(default_factory=lambda: secrets.randbelow(MOST_ROOM // 2))

    def another(self) -> int:
        """A room that nobody had."""
        self._next = (self._next + 1) % MOST_ROOM
        return self._next


class PairAttempt:
    """The decode worker answers the client. The prefill worker says when its half is done; when it fails before the first
    byte of the answer, its error is the answer, and the other half is given up."""

    def __init__(self, prefill: Sending, decode: Sending, passed: Passed, rooms: Rooms, told: Told) -> None:
        room = rooms.another()

        def half(sending: Sending, peer: Worker) -> PlainAttempt:
            meets = {ROOM: str(room), PEER: str(peer.about.get("peer")), ROUTER: rooms.router}
            headers: list[Header] = [(name.encode(), value.encode()) for name, value in meets.items()]
            return PlainAttempt(sending, replace(passed, headers=[*passed.headers, *headers]), told)

        self._prefill = half(prefill, decode.worker)
        self._decode = half(decode, prefill.worker)
        self._prefilling: asyncio.Task[bytes] | None = None
        self._refused: bytes | None = None
        """The body of the prefill worker's error, when that is the answer."""
        self._whole = False

    @property
    def _answers(self) -> PlainAttempt:
        return self._decode if self._refused is None else self._prefill

    @property
    def answerer(self) -> Worker:
        return self._answers.answerer

    @property
    def reply(self) -> Reply:
        return self._answers.reply

    @property
    def first(self) -> bytes:
        return self._decode.first if self._refused is None else self._refused

    async def begin(self) -> None:
        self._prefilling = asyncio.create_task(_whole(self._prefill))
        decoding = asyncio.create_task(self._decode.begin())
        try:
            await asyncio.wait((self._prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                body = self._prefilling.result()
                if self._prefill.reply.status >= 400:
                    self._refused = body
                    return
            await decoding
        finally:
            await _ended(decoding)

    async def next(self) -> bytes:
        if self._refused is not None:
            return b""
        piece = await self._decode.next()
        self._whole = not piece
        return piece

    async def end(self) -> None:
        try:
            if self._prefilling is not None:
                if self._whole and self._decode.reply.status < 400:
                    await asyncio.wait((self._prefilling,))  # it has done its work, and is about to say so
                await _ended(self._prefilling)
        finally:
            await self._prefill.end()
            await self._decode.end()


async def _whole(half: PlainAttempt) -> bytes:
    """All that the prefill worker answers. Raises AttemptFailed."""
    await half.begin()
    pieces = [half.first]
    while pieces[-1]:
        pieces.append(await half.next())
    return b"".join(pieces)


async def _ended(task: asyncio.Task[Any]) -> None:
    """End a task, whose failure is known or of no consequence."""
    task.cancel()
    for error in await asyncio.gather(task, return_exceptions=True):
        if isinstance(error, Exception) and not isinstance(error, AttemptFailed):
            raise error
