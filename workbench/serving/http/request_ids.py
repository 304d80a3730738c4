"""The id of a request beyond this server: ``x-request-id``, given by a client or a proxy, or made; every answer has it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.serving.requests import check_id, is_plain

HEADER = "x-request-id"
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
        scope[_KEY] = given if is_plain(given) else f"req-{uuid.uuid4().hex}"

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
    """Return the id that came with a request. Raises Refusal for one that is no plain word."""
    return check_id(HEADER, headers.get(HEADER))


def answered_as(scope: MutableMapping[str, Any], request_id: str) -> None:
    """Have a request that came without an id answered with the one that it has here."""
    if not any(name == HEADER.encode() for name, _ in scope["headers"]):
        scope[_KEY] = request_id


def id_of(scope: Mapping[str, Any]) -> str:
    """Return the id under which a request is answered."""
    found: str = scope[_KEY]
    return found
