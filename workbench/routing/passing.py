"""The way of a request through the router: a worker, another one if that fails, and the answer as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from workbench.routing.asked import Asked
from workbench.routing.attempts import Attempt, AttemptFailed, Passed, PlainAttempt
from workbench.routing.dispatch import Dispatch, Sending
from workbench.routing.headers import to_client
from workbench.routing.router_metrics import RouterMetrics
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
    clock: Callable[[], float]
    doubt: Callable[[Worker], None]
    """Told of a worker that failed a request."""


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, gone = asyncio.create_task(self._pass(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                self._means.metrics.client_gone()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _pass(self, send: Send) -> None:
        means = self._means
        failed: set[int] = set()
        for left in range(means.retries, -1, -1):
            sent = await means.dispatch.send(self._asked, failed, again=left < means.retries)
            attempt = self._attempt(sent)
            try:
                if await self._once(attempt, sent, failed, left, send):
                    return
            finally:
                await attempt.end()
            means.metrics.retried(attempt.answerer)

    def _attempt(self, sent: tuple[Sending, ...]) -> Attempt:
        return PlainAttempt(sent[0], self._passed)

    async def _once(self, attempt: Attempt, sent: tuple[Sending, ...], failed: set[int], left: int, send: Send) -> bool:
        """Try once; tells whether the request is answered, else it may be sent again. Raises ApiError."""
        means = self._means
        try:
            await attempt.begin()
            worker, status = attempt.answerer, attempt.reply.status
            retried = status in RETRIED_STATUSES and left > 0 and means.dispatch.has_other(sent, failed)
            held = b"" if retried else await _held(attempt)
        except AttemptFailed as error:
            means.metrics.answered(error.worker, None)
            means.doubt(error.worker)
            failed.add(error.worker.number)
            if left > 0:
                return False
            raise ApiError(
                502, f"worker {error.worker.number}: {error}", code="worker_failed", type="server_error"
            ) from error
        means.metrics.answered(worker, status)
        if retried:
            failed.add(worker.number)
            return False
        means.metrics.first_byte_s.observe(means.clock() - self._arrived_s)
        if self._answered is not None:
            self._answered(status, held, tuple(each.worker for each in sent))
        await self._answer(attempt, held, send)
        return True

    async def _answer(self, attempt: Attempt, held: bytes, send: Send) -> None:
        reply = attempt.reply
        await send({"type": "http.response.start", "status": reply.status, "headers": to_client(reply.headers)})
        piece, ended = held, True
        try:
            while piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                ended = piece.endswith(b"\n\n")
                piece = await attempt.next()
        except AttemptFailed as error:
            self._means.metrics.cut_off(error.worker)
            self._means.doubt(error.worker)
            if not _takes_events(attempt):
                return  # the connection is closed before the answer's end, which is all that can be said
            said = f"worker {error.worker.number} ended in the middle of its answer: {error}"
            event = error_event(ApiError(502, said, code="worker_failed", type="server_error"))
            piece = event if ended else b"\n\n" + event
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


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def session_in(body: bytes) -> str | None:
    """The session that an answer of ``/open_session`` names."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        found = msgspec.json.decode(body)
        if isinstance(found, dict) and isinstance(found.get("session_id"), str):
            return str(found["session_id"])
    return None
