"""The id of a request beyond this server: ``x-request-id``, given by a client or a proxy, or made; every answer has it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.serving.http.protocol import bad_value

HEADER = "x-request-id"
_WELL_FORMED = re.compile(r"[!-~]{1,200}")
_KEY = "workbench.request_id"


class RequestIds:
    """The application with the header on all that it answers, errors and streams included.

    An id that is no plain word is not sent back: it may come from anywhere, and is on its way into logs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == HEADER.encode()), "")
        scope[_KEY] = given if _WELL_FORMED.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message.get("headers", []) if pair[0] != HEADER.encode()]
                message = {
                    **message,
                    "headers": [*headers, (HEADER.encode(), scope[_KEY].encode("ascii"))],
                }
            await send(message)

        await self._app(scope, receive, with_id)


def given_id(headers: Mapping[str, str]) -> str | None:
    """The id that came with a request. Raises ApiError 400 for one that is no plain word."""
    return checked(HEADER, headers.get(HEADER))


def checked(name: str, given: str | None) -> str | None:
    """An id given as ``name``, which an answer's header can have. Raises ApiError 400 for one that is no plain word."""
    if given is not None and not _WELL_FORMED.fullmatch(given):
        raise bad_value(name, "must have between 1 and 200 printable ASCII characters and no space")
    return given


def answered_as(scope: MutableMapping[str, Any], request_id: str) -> None:
    """Have a request that came without an id answered with the one that it has here."""
    if not any(name == HEADER.encode() for name, _ in scope["headers"]):
        scope[_KEY] = request_id
