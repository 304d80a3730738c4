"""OpenAI's response shapes, and that of /generate: chunks of an engine call into JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from workbench.serving.engine_client import Call
from workbench.serving.messages import Chunk, LogprobText
from workbench.serving.protocol import ApiError

_encode = msgspec.json.Encoder().encode

_FAULTS = {
    "kv_exhausted": (503, "the KV cache is too small for this sequence to go on"),
    "queue_timeout": (503, "the request waited too long (--queue-timeout)"),
    "request_timeout": (504, "the request took too long (--request-timeout)"),
}

_REJECTIONS = {
    "unknown_session": (400, "session_id: no session of this name is open"),
    "session_busy": (409, "session_id: a request of this session has not ended yet"),
}


def fault_of(chunk: Chunk) -> ApiError | None:
    """The error that a sequence's end means for its request, None for an end that is an answer."""
    if chunk.kind == "rejected" and chunk.detail in _REJECTIONS:
        status, message = _REJECTIONS[chunk.detail]
        return ApiError(status, message, param="session_id", code=chunk.detail)
    if chunk.kind == "rejected":
        return ApiError(400, f"the prompt cannot be served: {chunk.detail.replace('_', ' ')}", code=chunk.detail)
    if chunk.kind == "aborted" and chunk.detail in _FAULTS:
        status, message = _FAULTS[chunk.detail]
        return ApiError(status, message, kind="server_error", code=chunk.detail)
    return None


def finish_reason(chunk: Chunk) -> str | None:
    """OpenAI's word, and ``abort`` for what /abort ended."""
    return {"": None, "aborted": "abort"}.get(chunk.kind, chunk.kind)


@dataclass
class Usage:
    """Token counts of a call, as its sequences end. The prompt counts once, however many choices share it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, index: int, n: int, chunk: Chunk) -> None:
        self.completion_tokens += len(chunk.token_ids)
        if chunk.kind and index % n == 0:
            self.prompt_tokens += chunk.prompt_tokens
            self.cached_tokens += chunk.cached_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Shape:
    """One endpoint's way to write an answer."""

    def __init__(self, call: Call, model: str, *, include_usage: bool = False) -> None:
        self.call = call
        self.model = model
        self.include_usage = include_usage
        self.usage = Usage()
        self.choices = call.prompts * call.n

    async def events(self) -> AsyncIterator[tuple[int, Chunk]]:
        """The call's events, counted; an end that is no answer raises its ApiError."""
        async for index, chunk in self.call.events():
            fault = fault_of(chunk)
            if fault is not None:
                raise fault
            self.usage.add(index, self.call.n, chunk)
            yield index, chunk

    async def whole(self) -> bytes:
        """The answer in one piece."""
        texts = [""] * self.choices
        last: list[Chunk | None] = [None] * self.choices
        logprobs: list[list[LogprobText]] = [[] for _ in range(self.choices)]
        tokens: list[list[int]] = [[] for _ in range(self.choices)]
        pieces: list[list[str]] = [[] for _ in range(self.choices)]
        async for index, chunk in self.events():
            pieces[index].append(chunk.text)
            tokens[index] += chunk.token_ids
            logprobs[index] += chunk.logprobs or []
            last[index] = chunk
        texts = ["".join(parts) for parts in pieces]
        ends = [chunk for chunk in last if chunk is not None]
        return _encode(self._whole(texts, tokens, logprobs, ends))

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        async for index, chunk in self.events():
            for piece in self._pieces(index, chunk):
                yield _event(piece)
        if self.include_usage:
            yield _event({**self._head(), "choices": [], "usage": self.usage.as_json()})
        yield b"data: [DONE]\n\n"

    def _head(self) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]],
               ends: list[Chunk]) -> dict[str, Any]:  # fmt: skip
        raise NotImplementedError

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _with_usage(self, piece: dict[str, Any]) -> dict[str, Any]:
        # OpenAI: asked for usage, every chunk has the field, and all but the last are null.
        return {**piece, "usage": None} if self.include_usage else piece


class CompletionShape(Shape):
    """/v1/completions."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._offsets = [0] * self.choices

    def _head(self) -> dict[str, Any]:
        return {"id": self.call.id, "object": "text_completion", "created": self.call.created_s, "model": self.model}

    def _choice(self, index: int, text: str, logprobs: list[LogprobText], end: Chunk) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, logprobs) if logprobs else None,
            "finish_reason": finish_reason(end),
            "stop_reason": end.stop_reason,
        }

    def _whole(self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]],
               ends: list[Chunk]) -> dict[str, Any]:  # fmt: skip
        choices = [self._choice(i, text, logprobs[i], ends[i]) for i, text in enumerate(texts)]
        return {**self._head(), "choices": choices, "usage": self.usage.as_json()}

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        if not (chunk.text or chunk.kind or chunk.logprobs):
            return []
        choice = self._choice(index, chunk.text, chunk.logprobs or [], chunk)
        return [self._with_usage({**self._head(), "choices": [choice]})]

    def _logprobs(self, index: int, found: list[LogprobText]) -> dict[str, Any]:
        offsets = []
        for item in found:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(item.token)
        return {
            "tokens": [item.token for item in found],
            "token_logprobs": [item.logprob for item in found],
            "top_logprobs": [{token: value for token, _, value in item.top} for item in found],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """/v1/chat/completions."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._begun = [False] * self.choices
        self._object = "chat.completion.chunk"

    def _head(self) -> dict[str, Any]:
        return {"id": self.call.id, "object": self._object, "created": self.call.created_s, "model": self.model}

    def _whole(self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]],
               ends: list[Chunk]) -> dict[str, Any]:  # fmt: skip
        self._object = "chat.completion"
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": _chat_logprobs(logprobs[i]),
                "finish_reason": finish_reason(ends[i]),
                "stop_reason": ends[i].stop_reason,
            }
            for i, text in enumerate(texts)
        ]
        return {**self._head(), "choices": choices, "usage": self.usage.as_json()}

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        pieces = []
        if not self._begun[index]:
            self._begun[index] = True
            pieces.append(self._piece(index, {"role": "assistant", "content": ""}, None, None, None))
        if chunk.text or chunk.kind or chunk.logprobs:
            delta = {"content": chunk.text} if chunk.text or chunk.logprobs else {}
            pieces.append(self._piece(index, delta, chunk.logprobs, finish_reason(chunk), chunk.stop_reason))
        return pieces

    def _piece(self, index: int, delta: dict[str, Any], logprobs: list[LogprobText] | None, reason: str | None,
               stop_reason: str | int | None) -> dict[str, Any]:  # fmt: skip
        choice = {
            "index": index, "delta": delta, "logprobs": _chat_logprobs(logprobs or []), "finish_reason": reason,
            "stop_reason": stop_reason,
        }  # fmt: skip
        return self._with_usage({**self._head(), "choices": [choice]})


class GenerateShape(Shape):
    """/generate: token ids beside the text, one sequence."""

    def _head(self) -> dict[str, Any]:
        return {"id": self.call.id, "model": self.model}

    def _whole(self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]],
               ends: list[Chunk]) -> dict[str, Any]:  # fmt: skip
        return {**self._head(), **self._body(texts[0], tokens[0], logprobs[0], ends[0]), "usage": self.usage.as_json()}

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        if not (chunk.token_ids or chunk.text or chunk.kind):
            return []
        piece = {**self._head(), **self._body(chunk.text, chunk.token_ids, chunk.logprobs or [], chunk)}
        if chunk.kind:
            piece["usage"] = self.usage.as_json()
        return [piece]

    def _body(self, text: str, tokens: list[int], logprobs: list[LogprobText], end: Chunk) -> dict[str, Any]:
        body: dict[str, Any] = {
            "output_ids": tokens, "text": text, "finish_reason": finish_reason(end), "stop_reason": end.stop_reason,
        }  # fmt: skip
        if logprobs:
            body["logprobs"] = _chat_logprobs(logprobs)
        return body


MakeShape = Callable[..., Shape]


def _chat_logprobs(found: list[LogprobText]) -> dict[str, Any] | None:
    if not found:
        return None

    def one(token: str, piece: bytes, value: float) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(piece)}

    return {
        "content": [
            {**one(item.token, item.token_bytes, item.logprob), "top_logprobs": [one(*top) for top in item.top]}
            for item in found
        ],
        "refusal": None,
    }


def _event(piece: dict[str, Any]) -> bytes:
    return b"data: " + _encode(piece) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """An error after the first event, when the status has been sent."""
    return b"data: " + _encode(error.body) + b"\n\n"
