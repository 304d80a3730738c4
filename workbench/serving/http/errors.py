"""Errors as HTTP has them: a status, and a body in the shape of OpenAI's."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from workbench.serving.refusals import Kind, Refusal

_INVALID, _SERVER, _OVERLOADED = "invalid_request_error", "server_error", "overloaded_error"


class _Meaning(NamedTuple):
    """A kind of refusal, as HTTP says it."""

    status: int
    type: str = _INVALID


MEANINGS: dict[Kind, _Meaning] = {
    "invalid_json": _Meaning(400),
    "invalid_type": _Meaning(400),
    "invalid_value": _Meaning(400),
    "missing_required_parameter": _Meaning(400),
    "unknown_parameter": _Meaning(400),
    "unsupported_parameter": _Meaning(400),
    "chat_template": _Meaning(400),
    "model_not_found": _Meaning(404),
    "context_length_exceeded": _Meaning(400),
    "duplicate_id": _Meaning(400),
    "empty_prompt": _Meaning(400),
    "output_bound_below_zero": _Meaning(400),
    "prompt_exceeds_context": _Meaning(400),
    "prompt_exceeds_kv": _Meaning(400),
    "grammar_too_complex": _Meaning(400),
    "grammar_with_drafts": _Meaning(400),
    "session_busy": _Meaning(409),
    "unknown_session": _Meaning(400),
    "duplicate_room": _Meaning(409),
    "grammar_or_session_of_a_pair": _Meaning(400),
    "grammar_dead_end": _Meaning(500, _SERVER),
    "kv_exhausted": _Meaning(503, _SERVER),
    "queue_timeout": _Meaning(503, _SERVER),
    "request_timeout": _Meaning(504, _SERVER),
    "handshake_timeout": _Meaning(503, _SERVER),
    "transfer_timeout": _Meaning(503, _SERVER),
    "transfer_failed": _Meaning(503, _SERVER),
    "prefill_gone": _Meaning(503, _SERVER),
    "decode_gone": _Meaning(503, _SERVER),
    "draining": _Meaning(503, _SERVER),
    "engine_dead": _Meaning(500, _SERVER),
    "no_answer": _Meaning(503, _SERVER),
    "overloaded": _Meaning(503, _OVERLOADED),
    "stuck": _Meaning(503, _SERVER),
    "too_slow": _Meaning(503, _SERVER),
}


class ApiError(Exception):
    """An answer other than success. Raised itself only for what HTTP alone knows: keys, origins, paths, sizes of bodies."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        type: str = _INVALID,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def api_error(refusal: Refusal) -> ApiError:
    """Return what a refusal of the service is to a client of HTTP."""
    meaning = MEANINGS[refusal.kind]
    return ApiError(
        meaning.status,
        str(refusal),
        code=refusal.kind,
        type=meaning.type,
        param=refusal.parameter,
        retry_after_s=refusal.retry_after_s,
    )


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``value`` as an answer."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as an answer."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


def error_event(error: ApiError) -> bytes:
    """Return an error as an event of a stream, when its status has been sent."""
    return b"data: " + msgspec.json.encode(error.body) + b"\n\n"
