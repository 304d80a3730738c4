"""What every application here does with a request before it looks at what is asked, and with errors after it: the key, the
size of the body, and OpenAI's shape for whatever went wrong."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from workbench.serving.http.errors import ApiError, api_error, error_response
from workbench.serving.refusals import Refusal


def check_key(headers: Mapping[str, str], key: str | None) -> None:
    """Raise ApiError for a request without the right key; None: it needs none."""
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() != "bearer" or not right:
        raise ApiError(401, "wrong or missing API key", code="invalid_api_key")


async def read_body(request: Request, limit: int) -> bytes:
    """Read the body of a request. Raises ApiError for more than ``limit`` bytes."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


def error_handlers(refused: Callable[[int], None]) -> Any:
    """Handlers of Starlette for whatever endpoints raise; ``refused`` is told every status."""

    async def on_api_error(request: Request, error: ApiError) -> Response:
        refused(error.status)
        return error_response(error)

    async def on_refusal(request: Request, refusal: Refusal) -> Response:
        return await on_api_error(request, api_error(refusal))

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        refused(error.status_code)
        made = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = error_response(made)
        response.headers.update(error.headers or {})
        return response

    async def on_fault(request: Request, error: Exception) -> Response:
        refused(500)
        return error_response(ApiError(500, "internal error", type="server_error"))

    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    return {
        ApiError: on_api_error,
        Refusal: on_refusal,
        HTTPException: on_http_error,
        Exception: on_fault,
        ClientDisconnect: on_disconnect,
    }
