"""OpenAI's response shapes: what comes for a request, as JSON."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from workbench.serving.chunks import FINISH_WORDS, Chunk, LogprobText
from workbench.serving.open_request import OpenRequest
from workbench.serving.outputs.parser import OutputParser
from workbench.serving.outputs.pieces import CallBegun, Content, Part, Reasoning

encode_json = msgspec.json.Encoder().encode


def finish_reason(chunk: Chunk) -> str | None:
    """Return OpenAI's word, and ``abort`` for what /abort ended."""
    return FINISH_WORDS.get(chunk.kind, chunk.kind) or None


@dataclass
class Usage:
    """Token counts of a request, as its sequences end. The prompt counts once, however many choices share it."""

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

    def __init__(
        self,
        request: OpenRequest,
        model: str,
        *,
        include_usage: bool = False,
        continuous_usage: bool = False,
        tokens_as_ids: bool = False,
        logprobs: bool = False,
        prompt_ids: list[list[int]] | None = None,
    ) -> None:
        """``logprobs``: they were asked for, and an answer without a token has an empty list of them; ``prompt_ids``: token
        ids were, and these are the prompts'."""
        self.request = request
        self.model = model
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.tokens_as_ids = tokens_as_ids
        self.logprobs = logprobs
        self.prompt_ids = prompt_ids
        self.usage = Usage()
        self.choices = request.prompts * request.n
        self.prompt_logprobs: list[dict[int, LogprobText]] = [{} for _ in range(self.choices)]
        """Of each choice, by place in its prompt: what is computed again after a retraction comes twice."""
        self._written = [0] * self.choices
        """Tokens of each choice so far."""

    async def events(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield the request's events, counted. Raises what they raise."""
        async for index, chunk in self.request.events():
            self.usage.add(index, self.request.n, chunk)
            self._written[index] += len(chunk.token_ids)
            if chunk.prompt_logprobs is not None:
                self.prompt_logprobs[index].update(enumerate(chunk.prompt_logprobs, chunk.prompt_first))
            yield index, chunk

    async def whole(self) -> bytes:
        """Return the answer in one piece."""
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
        return encode_json(self._whole(texts, tokens, logprobs, ends))

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        async for index, chunk in self.events():
            for piece in self._pieces(index, chunk):
                yield _event(piece)
        if self.include_usage:
            yield _event({**self._head(), "choices": [], "usage": self.usage.as_json()})
        yield b"data: [DONE]\n\n"

    def _head(self) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(
        self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]], ends: list[Chunk]
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _id_field(self, tokens: list[int]) -> dict[str, Any]:
        """Return the field of a choice that has these tokens, if it was asked for."""
        return {} if self.prompt_ids is None else {"token_ids": tokens}

    def _with_usage(
        self, piece: dict[str, Any], index: int, chunk: Chunk, written: int | None = None
    ) -> dict[str, Any]:
        if self.continuous_usage:
            tokens = self._written[index] if written is None else written
            return {**piece, "usage": Usage(chunk.prompt_tokens, tokens, chunk.cached_tokens).as_json()}
        # OpenAI: asked for usage, every chunk has the field, and all but the last are null.
        return {**piece, "usage": None} if self.include_usage else piece


@dataclass(frozen=True)
class Echo:
    """A prompt that comes before its answers."""

    text: str
    offsets: list[int]
    """Of its tokens."""
    first_id: int
    first: str
    """Its first token, of which nothing is known, as text and bytes."""
    first_bytes: bytes


class CompletionShape(Shape):
    """/v1/completions."""

    def __init__(self, *given: Any, echoes: list[Echo] | None = None, **options: Any) -> None:
        """``echoes``: one for each prompt, where answers begin with them."""
        super().__init__(*given, **options)
        self._echoes = echoes

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.request.id,
            "object": "text_completion",
            "created": self.request.created_s,
            "model": self.model,
        }

    def _choice(
        self,
        index: int,
        text: str,
        tokens: list[int],
        logprobs: list[LogprobText],
        end: Chunk,
        whole: bool = False,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text if self._echoes is None else self._echoes[index // self.request.n].text + text,
            "logprobs": self._all_logprobs(index, logprobs) if logprobs or (whole and self.logprobs) else None,
            "finish_reason": finish_reason(end),
            "stop_reason": end.stop_reason,
        }
        if self.prompt_ids is not None:
            choice["token_ids"] = tokens
            if whole or self._written[index] == len(tokens):
                choice["prompt_token_ids"] = self.prompt_ids[index // self.request.n]
        return choice

    def _whole(
        self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]], ends: list[Chunk]
    ) -> dict[str, Any]:
        choices = [self._choice(i, text, tokens[i], logprobs[i], ends[i], whole=True) for i, text in enumerate(texts)]
        return {**self._head(), "choices": choices, "usage": self.usage.as_json()}

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        if not (chunk.text or chunk.kind or chunk.logprobs or self.prompt_ids):
            return []
        choice = self._choice(index, chunk.text, chunk.token_ids, chunk.logprobs or [], chunk)
        return [self._with_usage({**self._head(), "choices": [choice]}, index, chunk)]

    def _all_logprobs(self, index: int, found: list[LogprobText]) -> dict[str, Any]:
        """Return those of an answer, and before them those of its prompt, if that comes before it: of its first token, as
        nothing is before it, null."""
        own = self._logprobs(found)
        if self._echoes is None:
            return own
        echo = self._echoes[index // self.request.n]
        prompt = self._logprobs([item for _, item in sorted(self.prompt_logprobs[index].items())])
        return {
            "tokens": [self._name(echo.first_id, echo.first, echo.first_bytes), *prompt["tokens"], *own["tokens"]],
            "token_logprobs": [None, *prompt["token_logprobs"], *own["token_logprobs"]],
            "top_logprobs": [None, *prompt["top_logprobs"], *own["top_logprobs"]],
            "text_offset": [*echo.offsets, *(len(echo.text) + offset for offset in own["text_offset"])],
        }

    def _logprobs(self, found: list[LogprobText]) -> dict[str, Any]:
        return {
            "tokens": [self._name(item.token_id, item.token, item.token_bytes) for item in found],
            "token_logprobs": [item.logprob for item in found],
            "top_logprobs": [self._top(item) for item in found],
            "text_offset": [item.offset for item in found],
        }

    def _top(self, item: LogprobText) -> dict[str, float]:
        """One entry for each of the likeliest tokens, and one for the sampled token if it is none of them. A text that
        several have belongs to the sampled one, or to the likeliest; the others are told by their ids."""
        sampled = self._name(item.token_id, item.token, item.token_bytes)
        owner = {sampled: item.token_id}
        top: dict[str, float] = {}
        for token_id, (token, piece, value) in zip(item.top_ids, item.top, strict=True):
            name = self._name(token_id, token, piece)
            if owner.setdefault(name, token_id) != token_id:
                name = _id_name(token_id)
            top[name] = item.logprob if token_id == item.token_id else value
        top.setdefault(sampled, item.logprob)
        return top

    def _name(self, token_id: int, token: str, piece: bytes) -> str:
        """A token as text; one that is no text, as OpenAI writes it: ``bytes:\\xe2\\x82``."""
        if self.tokens_as_ids:
            return _id_name(token_id)
        try:
            piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
        return token


@dataclass(frozen=True)
class Apart:
    """What is told apart in the outputs of a chat."""

    parsers: list[OutputParser]
    """One for each choice."""
    id_characters: int = 24
    """Of the ids of calls."""
    reasoning: bool = True
    """Reasoning is part of the answer."""
    called: str = "tool_calls"
    """Finish reason of an answer that calls tools and ended by itself."""

    def call(self, name: str, arguments: str) -> dict[str, Any]:
        """Return a call as chats have it, under an id of its own."""
        function = {"name": name, "arguments": arguments}
        return {"id": call_id(self.id_characters), "type": "function", "function": function}


class ChatShape(Shape):
    """/v1/chat/completions."""

    def __init__(self, *given: Any, apart: Apart | None = None, **options: Any) -> None:
        super().__init__(*given, **options)
        self._apart = apart
        """None: all of each output is content."""
        self._begun = [False] * self.choices
        self._object = "chat.completion.chunk"

    def _head(self) -> dict[str, Any]:
        return {"id": self.request.id, "object": self._object, "created": self.request.created_s, "model": self.model}

    def _whole(
        self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]], ends: list[Chunk]
    ) -> dict[str, Any]:
        self._object = "chat.completion"
        choices = [
            {
                "index": i,
                "message": self._message(i, text),
                "logprobs": self._logprobs(logprobs[i], whole=True),
                "finish_reason": self._finish_reason(i, ends[i]),
                "stop_reason": ends[i].stop_reason,
                **self._id_field(tokens[i]),
            }
            for i, text in enumerate(texts)
        ]
        return {**self._head(), **self._prompt_ids(), "choices": choices, "usage": self.usage.as_json()}

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt_ids[0]} if self.prompt_ids else {}

    def _finish_reason(self, index: int, end: Chunk) -> str | None:
        reason = finish_reason(end)
        called = self._apart is not None and reason == "stop" and self._apart.parsers[index].calls
        return self._apart.called if self._apart is not None and called else reason

    def _message(self, index: int, text: str) -> dict[str, Any]:
        """Return a whole answer."""
        if self._apart is None:
            return {"role": "assistant", "content": text, "refusal": None}
        parser = self._apart.parsers[index]
        content, reasoning, calls = told_apart([*parser.push(text), *parser.finish()])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning and self._apart.reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["content"] = content if content.strip() else None
            message["tool_calls"] = [self._apart.call(name, arguments) for name, arguments in calls]
        return message

    def _deltas(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return what is new in a choice, of which the last tells its end."""
        assert self._apart is not None
        parser = self._apart.parsers[index]
        parts = parser.push(chunk.text)
        if chunk.kind:
            parts += parser.finish()
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Content):
                deltas.append({"content": part.text})
            elif isinstance(part, Reasoning):
                deltas += [{"reasoning_content": part.text}] if self._apart.reasoning else []
            elif isinstance(part, CallBegun):
                deltas.append({"tool_calls": [{"index": part.index, **self._apart.call(part.name, "")}]})
            else:
                deltas.append({"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]})
        return deltas or ([{}] if chunk.kind or chunk.logprobs or self.prompt_ids else [])

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        pieces = []
        if not self._begun[index]:
            self._begun[index] = True
            pieces.append(self._piece(index, {"role": "assistant", "content": ""}, chunk, begin=True))
            pieces[0].update(self._prompt_ids())
        if chunk.text or chunk.kind or chunk.logprobs or self.prompt_ids:
            if self._apart is None:  # nearly every chunk of nearly every chat
                pieces.append(self._piece(index, _content_of(chunk), chunk))
                return pieces
            deltas = self._deltas(index, chunk)
            for delta in deltas[:-1]:
                pieces.append(self._piece(index, delta, chunk, inside=True))
            pieces += [self._piece(index, delta, chunk) for delta in deltas[-1:]]
        return pieces

    def _piece(
        self, index: int, delta: dict[str, Any], chunk: Chunk, begin: bool = False, inside: bool = False
    ) -> dict[str, Any]:
        """``begin``: before the first token; ``inside``: another piece of the same chunk follows."""
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        if not begin and not inside:
            choice["logprobs"] = self._logprobs(chunk.logprobs or [])
            if chunk.kind:
                choice["finish_reason"], choice["stop_reason"] = self._finish_reason(index, chunk), chunk.stop_reason
            if self.prompt_ids is not None:
                choice.update(self._id_field(chunk.token_ids))
        return self._with_usage({**self._head(), "choices": [choice]}, index, chunk, 0 if begin else None)

    def _logprobs(self, found: list[LogprobText], whole: bool = False) -> dict[str, Any] | None:
        if not found and not (whole and self.logprobs):
            return None
        return chat_logprobs(found, self.tokens_as_ids)


def _content_of(chunk: Chunk) -> dict[str, Any]:
    return {"content": chunk.text} if chunk.text or chunk.logprobs else {}


def told_apart(parts: list[Part]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return an output's content, its reasoning, and the names and arguments of its calls."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        if isinstance(part, Content):
            content.append(part.text)
        elif isinstance(part, Reasoning):
            reasoning.append(part.text)
        elif isinstance(part, CallBegun):
            calls.append((part.name, []))
        else:
            calls[part.index][1].append(part.text)
    return "".join(content), "".join(reasoning), [(name, "".join(texts)) for name, texts in calls]


def call_id(characters: int) -> str:
    """Return the id of a call: letters and digits alone where a model's template wants so few."""
    made = uuid.uuid4().hex[:characters]
    return made if characters < 24 else f"call_{made}"


def chat_logprobs(found: list[LogprobText], tokens_as_ids: bool = False) -> dict[str, Any]:
    """Return log probabilities as chats have them."""

    def one(token_id: int, token: str, piece: bytes, value: float) -> dict[str, Any]:
        return {"token": _id_name(token_id) if tokens_as_ids else token, "logprob": value, "bytes": list(piece)}

    return {
        "content": [
            {
                **one(item.token_id, item.token, item.token_bytes, item.logprob),
                "top_logprobs": [one(i, *top) for i, top in zip(item.top_ids, item.top, strict=True)],
            }
            for item in found
        ],
        "refusal": None,
    }


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


def _event(piece: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(piece) + b"\n\n"
