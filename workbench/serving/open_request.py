"""A request that is being answered: its sequences, and what has come for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from workbench.serving.chunks import Chunk
from workbench.serving.refusals import Refusal, refusal_of
from workbench.serving.requests import ServiceRequest


class ClientGone(Exception):
    """The end of a request whose client has disconnected."""


class OpenSequence:
    """One sequence of a request: the answer to one of its prompts, one of ``n``."""

    __slots__ = ("index", "last_s", "number", "request", "rooms", "sequence_id", "tokens")

    def __init__(self, request: OpenRequest, index: int, number: int, sequence_id: str) -> None:
        self.request = request
        self.index = index
        self.number = number
        self.sequence_id = sequence_id
        self.tokens = 0
        self.last_s = 0.0
        self.rooms: Sequence[tuple[str, int]] = ()
        """What no other has meanwhile, where it shares its request with another instance."""


class Engine(Protocol):
    """The part of an engine that a request needs."""

    unread_bytes: int

    def close(self, request: OpenRequest, why: str) -> None:
        """Abort what is open of a request, for a reason that records have."""
        ...


class OpenRequest:
    """One request of a client. Ends with :meth:`close`."""

    def __init__(self, engine: Engine, request_id: str, asked: ServiceRequest) -> None:
        self._engine = engine
        self.id = request_id
        self.label = asked.label
        self.prompts = len(asked.prompts)
        self.n = asked.n
        self._prompt_parameter = asked.prompt_parameter
        self.created_s = int(time.time())
        self.arrival_s = time.monotonic()
        self.open: dict[int, OpenSequence] = {}
        """Sequences that have not ended, by number."""
        self._queue: asyncio.Queue[tuple[int, Chunk] | Exception] = asyncio.Queue()
        self.unread_bytes = 0

    async def events(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield (index of the sequence, what is new) until every sequence has ended.

        Raises Refusal where no answer, or no more of it, can be given, ClientGone where nobody waits for it.
        """
        left = self.prompts * self.n
        while left:
            event = await self._queue.get()
            self._count(event, -1)
            if isinstance(event, Exception):
                raise event
            refusal = refusal_of(event[1].kind, event[1].detail, self._prompt_parameter)
            if refusal is not None:
                raise refusal
            left -= bool(event[1].kind)
            yield event

    def put(self, event: tuple[int, Chunk] | Exception) -> None:
        """Add what is to be read next."""
        self._count(event, 1)
        self._queue.put_nowait(event)

    def _count(self, event: tuple[int, Chunk] | Exception, sign: int) -> None:
        if not isinstance(event, Exception):
            held_bytes = sign * _held_bytes(event[1])
            self.unread_bytes += held_bytes
            self._engine.unread_bytes += held_bytes

    def drop_unread(self) -> None:
        """Forget what nobody will read."""
        while not self._queue.empty():
            self._count(self._queue.get_nowait(), -1)

    def too_slow(self) -> None:
        """End it: too much of it waits to be read."""
        self.drop_unread()
        self.fail("too_slow", Refusal("too_slow", "the answer was read too slowly"))

    def disconnected(self) -> None:
        """End it: the client has gone, and nobody needs what is still to come."""
        self.drop_unread()
        self.fail("disconnected", ClientGone())

    def fail(self, why: str, error: Exception) -> None:
        """End it early: records have ``why``, and the client, after what waits to be read, ``error``."""
        self._engine.close(self, why)
        self.put(error)

    def close(self) -> None:
        """Forget it. What has not ended by now is aborted: the answer failed before it was whole."""
        self._engine.close(self, "request_failed")
        self.drop_unread()


def _held_bytes(chunk: Chunk) -> int:
    """Return about how much memory a chunk takes while it waits."""
    held_bytes = 400 + 2 * len(chunk.text)
    for told in (chunk.logprobs, chunk.prompt_logprobs):
        if told is not None:
            held_bytes += sum(300 * (1 + len(item.top)) for item in told)
    return held_bytes
