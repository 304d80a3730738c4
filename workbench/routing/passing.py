"""The way of a request through the router: a worker, another one if that fails, and the answer as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from workbench.cluster.pairs import RETRIED
from workbench.routing.asked import Asked
from workbench.routing.attempts import OVERLOADED, Attempt, AttemptFailed, Passed, PlainAttempt
from workbench.routing.dispatch import Dispatch, Sending
from workbench.routing.headers import to_client
from workbench.routing.pair_attempt import PairAttempt, Rooms
from workbench.routing.router_metrics import RouterMetrics
from workbench.routing.upstream import object_in
from workbench.routing.worker import Worker
from workbench.serving.http.errors import ApiError, error_event

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Answers in place of which another worker's may be had."""
HELD_BYTES = 1 << 20
"""An answer in JSON is held back until it is whole, up to this size: a worker that dies in the middle of it is no loss."""


@dataclass(frozen=True)
class Means:
    """What all requests share."""

    dispatch: Dispatch
    metrics: RouterMetrics
    retries: int
    rooms: Rooms
    clock: Callable[[], float]
    doubt: Callable[[Worker], None]
    """Told of a worker that failed a request."""


class _Again(Exception):
    """A request is to be sent again; ``blamed``: not to this worker, if there is another."""

    def __init__(self, worker: Worker, blamed: bool) -> None:
        super().__init__()
        self.worker = worker
        self.blamed = blamed


class Passing:
    """The answer to a request that a worker answers, as an ASGI application. A client that goes ends it, wherever it is."""

    def __init__(
        self,
        means: Means,
        asked: Asked,
        passed: Passed,
        answered: Callable[[int, bytes, tuple[Worker, ...]], None] | None = None,
    ) -> None:
        """``answered`` is told status, body (of an answer that was held back) and workers of an answer."""
        self._means = means
        self._asked = asked
        self._passed = passed
        self._answered = answered
        self._arrived_s = means.clock()
        self._lost_once = False
        self._over = False
        """The answer has been sent to its end: that the client goes then is as it should be."""
        self._left = False
        """The client has gone before that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        watching = asyncio.create_task(self._watch(receive, task))
        try:
            await self._pass(send)
        except asyncio.CancelledError:
            if not self._left:
                raise
            task.uncancel()
            self._means.metrics.client_gone()
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._over:
            self._left = True
            task.cancel()

    async def _pass(self, send: Send) -> None:
        means = self._means
        failed: set[int] = set()
        lost: tuple[int, int] | None = None
        for left in range(means.retries, -1, -1):
            sent = await means.dispatch.send(self._asked, failed, lost, again=left < means.retries)
            attempt = self._attempt(sent)
            try:
                held = await self._begin(attempt, sent, failed, left)
                return await self._answer(attempt, sent, held, send)
            except _Again as again:
                means.metrics.retried(again.worker)
                if again.blamed:
                    failed.add(again.worker.number)
                if len(sent) == 2:
                    lost = sent[0].worker.number, sent[1].worker.number
            finally:
                await attempt.end()

    async def _begin(self, attempt: Attempt, sent: tuple[Sending, ...], failed: set[int], left: int) -> bytes:
        """Wait for an answer that the client gets, and return what is held back of it. Raises _Again where the request is to
        be sent again, which it can be ``left`` times, and ApiError where that is no more."""
        try:
            await attempt.begin()
            held = await _held(attempt)
        except AttemptFailed as error:
            if left > 0:
                raise _Again(error.worker, True) from error
            said = f"worker {error.worker.number}: {error}"
            raise ApiError(502, said, code="worker_failed", type="server_error") from error
        worker, status = attempt.answerer, attempt.reply.status
        code = _code_in(held) if len(sent) == 2 and status == OVERLOADED else None
        if code in RETRIED:
            # The pair has lost it: as in a simulation it is sent once more, to another pair if there is one.
            if left > 0 and not self._lost_once:
                self._lost_once = True
                gone = next((each.worker for each in sent if code == f"{each.worker.role}_gone"), None)
                if gone is not None:
                    self._means.doubt(gone)
                raise _Again(gone or worker, gone is not None)
        elif status in RETRIED_STATUSES and left > 0 and self._means.dispatch.has_other(worker, failed):
            raise _Again(worker, True)
        return held

    def _attempt(self, sent: tuple[Sending, ...]) -> Attempt:
        if len(sent) == 2:
            return PairAttempt(*sent, self._passed, self._means.rooms, self._told)
        return PlainAttempt(sent[0], self._passed, self._told)

    def _told(self, worker: Worker, status: int | None) -> None:
        self._means.metrics.answered(worker, status)
        if status is None:
            self._means.doubt(worker)

    async def _answer(self, attempt: Attempt, sent: tuple[Sending, ...], held: bytes, send: Send) -> None:
        means, reply = self._means, attempt.reply
        means.metrics.first_byte_s.observe(means.clock() - self._arrived_s)
        if self._answered is not None:
            self._answered(reply.status, held, tuple(each.worker for each in sent))
        await send({"type": "http.response.start", "status": reply.status, "headers": to_client(reply.headers)})
        piece, ended = held, True
        try:
            while piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                ended = piece.endswith(b"\n\n")
                piece = await attempt.next()
        except AttemptFailed as error:
            means.metrics.cut_off(error.worker)
            if not _takes_events(attempt):
                return  # the connection is closed before the answer's end, which is all that can be said
            said = f"worker {error.worker.number} ended in the middle of its answer: {error}"
            event = error_event(ApiError(502, said, code="worker_failed", type="server_error"))
            piece = event if ended else b"\n\n" + event
        self._over = True
        await send({"type": "http.response.body", "body": piece})


async def _held(attempt: Attempt) -> bytes:
    """The first piece of an answer, and of JSON all the others. Raises AttemptFailed."""
    if attempt.reply.header(b"content-type").partition(b";")[0].strip().lower() != b"application/json":
        return attempt.first
    pieces, size = [attempt.first], len(attempt.first)
    while pieces[-1] and size < HELD_BYTES:
        pieces.append(await attempt.next())
        size += len(pieces[-1])
    return b"".join(pieces)


def _takes_events(attempt: Attempt) -> bool:
    """Whether an event can follow what has been sent."""
    kind = attempt.reply.header(b"content-type").partition(b";")[0].strip().lower()
    return kind == b"text/event-stream" and attempt.reply.header(b"content-encoding") in (b"", b"identity")


def session_in(body: bytes) -> str | None:
    """The session that an answer of ``/open_session`` names."""
    found = object_in(body).get("session_id")
    return found if isinstance(found, str) else None


def _code_in(body: bytes) -> str | None:
    """The code of an error."""
    error = object_in(body).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None
