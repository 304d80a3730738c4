"""One completion after another from an OpenAI-compatible server, streamed, with the moments at which its tokens came."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
import numpy as np

from ground.errors import InputError
from reports.record.schema import ABORTED, FINISHED, REJECTED, UNFINISHED
from workbench.clients.event_stream import DONE, Event, events

CONNECT_TIMEOUT_S = 10.0
_MESSAGE_CHARACTERS = 200
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


FAILURES = frozenset({"abort", "aborted", "cancelled", "canceled", "content_filter", "error", "timeout"})
"""Finish reasons of answers that did not get to their end."""


class ServerRefused(InputError):
    """The server cannot be used, in one line."""


@dataclass(slots=True)
class Answer:
    """The outcome of one request. Moments are seconds of the caller's clock."""

    sent_s: float
    """When the request that was answered went out: the last one, if the server had to be asked in other words."""
    chunk_s: list[float] = field(default_factory=list)
    """When each piece with tokens came."""
    finish_s: float = float("nan")
    status: str = UNFINISHED
    reason: str | None = None
    """Why it ended, in the server's word."""
    message: str = ""
    """What the server said of a failure."""
    prompt_tokens: int | None = None
    """As the server counts them; None where it does not say."""
    output_tokens: int | None = None
    cached_tokens: int = 0
    resent: int = 0
    """How often it was asked again in other words."""


@dataclass
class Dialect:
    """Fields that the server understands: all until it refuses one by name."""

    ignore_eos: bool = True
    request_id: bool = True
    stream_options: bool = True
    """Token counts at the end of a stream."""
    token_ids: bool = True
    """Prompts as token ids; else as text."""
    ids_taken: bool = False
    """A prompt of token ids has been answered."""
    notes: list[str] = field(default_factory=list)

    def drop(self, refused: str, sent: Dialect, has_text: bool) -> bool:
        """Learn from a refusal of a request that was put as in ``sent``; whether to ask again in other words."""
        said = refused.lower()
        for name, loss in _LOSSES.items():
            if getattr(sent, name) and name in said:
                if getattr(self, name):
                    setattr(self, name, False)
                    self.notes.append(f"the server takes no {name}: {loss}")
                return True
        # Servers put it in many words: "prompt: Input should be a valid string", "token ids are not supported", ...
        too_long = any(word in said for word in ("context", "length", "longer", "maximum", "too many"))
        about_ids = "prompt" in said or "token" in said or "string" in said
        if sent.token_ids and not self.ids_taken and has_text and about_ids and not too_long:
            if self.token_ids:
                self.token_ids = False
                self.notes.append(
                    "the server takes no token ids: prompts are sent as text, which it may split into other tokens"
                )
            return True
        return False


_LOSSES = {
    "ignore_eos": "answers may end before the length in the trace",
    "request_id": "its own records name the requests differently",
    "stream_options": "tokens are counted by the pieces they came in",
}


class CompletionsClient:
    """Streams /v1/completions. ``now_s`` is the clock of all moments; ``text_of`` turns ids into text, where that can be.

    Use it as an asynchronous context.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        now_s: Callable[[], float],
        *,
        api_key: str | None = None,
        text_of: Callable[[np.ndarray], str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        headers = {"content-type": "application/json"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        base = url.rstrip("/")
        self.url = base.removesuffix("/v1")
        self.model = model or ""
        self.dialect = Dialect(token_ids=True)
        self._now_s = now_s
        self._text_of = text_of
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.url,
                headers=headers,
                trust_env=False,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise ServerRefused(f"{url}: {error}") from error

    async def __aenter__(self) -> CompletionsClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def find_model(self) -> None:
        """Reach the server, check the key, and check or find out the model's name.

        Raises ServerRefused.
        """
        where = f"{self.url}/v1/models"
        try:
            reply = await self._http.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ServerRefused(f"{self.url}: {_reason(error)}") from error
        if reply.status_code in (404, 405) and self.model:
            return  # not every server lists its models
        if reply.status_code >= 400:
            raise ServerRefused(f"{where}: {reply.status_code} {_said(reply.content)}")
        try:
            names = [str(entry["id"]) for entry in _decode(reply.content)["data"]]
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise ServerRefused(f"{where}: not the answer of an OpenAI-compatible server") from error
        if not self.model and len(names) == 1:
            self.model = names[0]
        elif self.model not in names:
            listed = ", ".join(names) or "none"
            what = f"no model {self.model!r}; it serves: {listed}" if self.model else f"name one with --model: {listed}"
            raise ServerRefused(f"{self.url}: {what}")

    async def complete(self, request_id: str, prompt: np.ndarray, max_tokens: int, answer: Answer) -> None:
        """Ask, and fill ``answer`` as its tokens come. A failure becomes its status.

        An answer has finished when the server gave a reason that is no failure, or all tokens that were asked for.
        """
        while True:
            sent = dataclasses.replace(self.dialect)
            answer.sent_s = self._now_s()
            broken = ""
            try:
                refused = await self._once(self._body(request_id, prompt, max_tokens), answer)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                refused, broken = None, _reason(error)
            if refused is None:
                self._settle(answer, max_tokens, broken)
                self.dialect.ids_taken |= sent.token_ids and bool(answer.chunk_s)
                return
            status, said = refused
            if status in (400, 422) and self.dialect.drop(said, sent, self._text_of is not None):
                answer.resent += 1
                continue
            answer.status, answer.message = f"{REJECTED}:http_{status}", f"{status} {said}"
            answer.finish_s = self._now_s()
            return

    def _settle(self, answer: Answer, max_tokens: int, broken: str) -> None:
        """Say how an answer ended whose stream is over; ``broken`` is what its connection ended with, if not well."""
        tokens = len(answer.chunk_s) if answer.output_tokens is None else answer.output_tokens
        if not answer.message and (answer.reason is not None or tokens >= max_tokens):
            if answer.reason in FAILURES:
                answer.status, answer.message = f"{ABORTED}:{answer.reason}", f"finish_reason {answer.reason}"
            else:
                answer.status = FINISHED
            if answer.finish_s != answer.finish_s:
                answer.finish_s = answer.chunk_s[-1] if answer.chunk_s else self._now_s()
            return
        answer.finish_s = self._now_s()
        if answer.message:
            answer.status = f"{ABORTED}:error"
        elif broken:
            answer.status, answer.message = f"{ABORTED if answer.chunk_s else REJECTED}:connection", broken
        else:
            answer.status = f"{ABORTED}:cut_off"
            answer.message = f"no finish_reason, and {tokens} of {max_tokens} tokens"

    def _body(self, request_id: str, prompt: np.ndarray, max_tokens: int) -> bytes:
        said: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        dialect = self.dialect
        if dialect.token_ids or self._text_of is None:
            said["prompt"] = prompt.tolist()
        else:
            said["prompt"] = self._text_of(prompt)
        if dialect.stream_options:
            said["stream_options"] = {"include_usage": True}
        if dialect.ignore_eos:
            said["ignore_eos"] = True
        if dialect.request_id:
            said["request_id"] = request_id
        return _encode(said)

    async def _once(self, body: bytes, answer: Answer) -> tuple[int, str] | None:
        """Send once; return status and words of a refusal."""
        async with self._http.stream("POST", "/v1/completions", content=body) as reply:
            if reply.status_code != 200:
                return reply.status_code, _said(await reply.aread())
            blocks = reply.aiter_bytes()
            first = await anext(blocks, b"")
            if first.lstrip().startswith((b"{", b"[")):
                answer.message = _not_streamed(b"".join([first, *[block async for block in blocks]]))
                return None
            async for event in events(_again(first, blocks)):
                if event.data == DONE:
                    break
                self._take(event, answer)
                if answer.message:
                    break
        return None

    def _take(self, event: Event, answer: Answer) -> None:
        """One event of a stream: tokens, why it ended, counts, or what went wrong."""
        now = self._now_s()
        try:
            chunk = _decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer.message = f"not JSON: {event.data[:60]!r}"
            return
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if event.name == "error" or not isinstance(chunk, dict) or _is_error(chunk, choices):
            answer.message = _said(event.data) or "an error without words"
            return
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            if choice.get("error"):
                answer.message = _words(choice)
                return
            why = choice.get("finish_reason")
            if isinstance(why, dict):  # as SGLang's own endpoints say it
                why = why.get("type")
            # A last piece without text only says why it ended; any other stands for a token at least.
            if choice.get("text") or not why:
                answer.chunk_s.append(now)
            if why:
                answer.reason, answer.finish_s = str(why), now
        if isinstance(usage := chunk.get("usage"), dict):
            _count(answer, usage)


def _is_error(chunk: dict[str, Any], choices: Any) -> bool:
    """Tell whether an event is an error: servers have many shapes for it.

    What has no choices and says nothing, such as a sign
    of life, is none."""
    if chunk.get("error") or chunk.get("errors") or "error" in (chunk.get("object"), chunk.get("type")):
        return True
    if choices is not None or isinstance(chunk.get("usage"), dict):
        return False
    return any(chunk.get(name) for name in ("detail", "message", "error_message", "error_code", "exception"))


def _not_streamed(body: bytes) -> str:
    """Return what is wrong with a success that is one JSON object: it should have been a stream."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        found: Any = _decode(body)
        if isinstance(found, dict) and "choices" not in found:
            return _words(found)
    return "answered in one piece, without streaming"


def _count(answer: Answer, usage: dict[str, Any]) -> None:
    details = usage.get("prompt_tokens_details")
    answer.prompt_tokens = _whole(usage.get("prompt_tokens"))
    answer.output_tokens = _whole(usage.get("completion_tokens"))
    answer.cached_tokens = _whole(details.get("cached_tokens")) or 0 if isinstance(details, dict) else 0


def _whole(value: Any) -> int | None:
    """A count, in whatever notation; None where it is none."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


async def _again(first: bytes, blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream with the block that was read from it."""
    yield first
    async for block in blocks:
        yield block


def _said(body: bytes) -> str:
    """The message in an error's body, on one line."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _words(_decode(body))
    return _line(body.decode(errors="replace"))


_WORDS_OF_ERRORS = (
    "error",
    "errors",
    "message",
    "msg",
    "detail",
    "error_message",
    "reason",
    "exception",
    "code",
    "type",
)
"""Where servers say what is wrong, the most telling first."""


def _words(found: Any) -> str:
    """Return what an error says, whatever its shape, on one line."""
    while True:
        if isinstance(found, dict):
            inner = next((found[name] for name in _WORDS_OF_ERRORS if found.get(name)), None)
        elif isinstance(found, list) and found:
            inner = found[0]
        else:
            inner = None
        if inner is None:
            return _line(found if isinstance(found, str) else _encode(found).decode())
        found = inner


def _line(text: str) -> str:
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]


def _reason(error: Exception) -> str:
    """An exception of the HTTP client in a few words."""
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx2.ConnectError):
        return f"cannot be reached ({' '.join(str(error).split()) or 'connection refused'})"
    return " ".join(str(error).split()) or type(error).__name__


def monotonic_since(began_s: float) -> Callable[[], float]:
    """A clock in seconds since ``began_s`` of the monotonic one."""
    return lambda: time.monotonic() - began_s
