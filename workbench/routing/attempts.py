"""One attempt at a request, from its sending to the end of the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from workbench.routing.connection import Header, WorkerFailed
from workbench.routing.dispatch import Sending
from workbench.routing.headers import with_key_of
from workbench.routing.upstream import Reply
from workbench.routing.worker import Worker

FAULTS_FROM = 500
OVERLOADED = 503
"""No fault of a worker: it has said that it takes no more now."""


@dataclass(frozen=True)
class Passed:
    """A request as it is sent on."""

    method: str
    target: bytes
    """Path and query, as they came."""
    headers: list[Header]
    body: bytes


class AttemptFailed(Exception):
    """A worker has failed a request."""

    def __init__(self, worker: Worker, why: str) -> None:
        super().__init__(why)
        self.worker = worker


class Attempt(Protocol):
    """One at a worker, or at a pair."""

    @property
    def answerer(self) -> Worker:
        """Whose answer it is."""
        ...

    @property
    def reply(self) -> Reply: ...

    @property
    def first(self) -> bytes:
        """First piece of the answer's body; empty where there is none."""
        ...

    async def begin(self) -> None:
        """Send, and wait for the first byte. Raises AttemptFailed."""
        ...

    async def next(self) -> bytes:
        """The next piece of the body; empty at its end. Raises AttemptFailed."""
        ...

    async def end(self) -> None:
        """Close what is open. Has to be called, whatever has happened."""
        ...


Told = Callable[[Worker, int | None], None]
"""Told of a worker and the status of its answer, or None where it gave none."""


class PlainAttempt:
    """One at a worker that serves whole requests, or the half of a pair that answers the client."""

    def __init__(self, sending: Sending, passed: Passed, told: Told) -> None:
        self.answerer = sending.worker
        self.reply: Reply
        self.first = b""
        self._sending = sending
        self._passed = passed
        self._told = told
        self._open: Reply | None = None

    async def begin(self) -> None:
        passed, worker = self._passed, self.answerer
        headers = with_key_of(worker, passed.headers)
        try:
            self._open, self.first = await worker.upstream.begin(passed.method, passed.target, headers, passed.body)
        except WorkerFailed as error:
            raise self._failed(error) from error
        self.reply = self._open
        self._told(worker, self.reply.status)
        self._sending.answered()
        if not self.first:
            self._sending.ended(well(self.reply.status))

    async def next(self) -> bytes:
        try:
            piece = await self.reply.next()
        except WorkerFailed as error:
            raise self._failed(error) from error
        if not piece:
            self._sending.ended(well(self.reply.status))
        return piece

    async def end(self) -> None:
        self._sending.ended(None if self._open is None else well(self.reply.status, whole=False))
        if self._open is not None:
            self._open.close()

    def _failed(self, error: WorkerFailed) -> AttemptFailed:
        self._sending.ended(False)
        self._told(self.answerer, None)
        return AttemptFailed(self.answerer, str(error))


def well(status: int, whole: bool = True) -> bool | None:
    """What an answer tells of its worker: that it is well, that it is not, or (None) nothing. ``whole``: it has ended."""
    if status >= FAULTS_FROM and status != OVERLOADED:
        return False
    return None if status == OVERLOADED or not whole else True
