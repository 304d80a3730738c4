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

from reports.schema import ABORTED, FINISHED, REJECTED, UNFINISHED

CONNECT_TIMEOUT_S = 10.0
_MESSAGE_CHARACTERS = 200
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class ServerRefused(ValueError):
    """The server cannot be used, in one line."""


@dataclass(slots=True)
class Answer:
    """What came of one request. Moments are seconds of the caller's clock."""

    sent_s: float
    """When the request that was answered went out: the last one, if the server had to be asked in other words."""
    chunk_s: list[float] = field(default_factory=list)
    """When each piece with tokens came."""
    finish_s: float = float("nan")
    status: str = UNFINISHED
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
    """What the server understands: everything until it refuses a field by name."""

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

    def __init__(self, url: str, model: str | None, now_s: Callable[[], float], *, api_key: str | None = None,
                 text_of: Callable[[np.ndarray], str] | None = None, timeout_s: float = 600.0) -> None:  # fmt: skip
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
                base_url=self.url, headers=headers, trust_env=False,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )  # fmt: skip
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
        """Ask, and fill ``answer`` as its tokens come. A failure becomes its status."""
        while True:
            sent = dataclasses.replace(self.dialect)
            answer.sent_s = self._now_s()
            try:
                refused = await self._once(self._body(request_id, prompt, max_tokens), answer)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                begun = ABORTED if answer.chunk_s else REJECTED
                answer.status, answer.message = f"{begun}:connection", _reason(error)
                answer.finish_s = self._now_s()
                return
            if refused is None:
                return
            status, said = refused
            if status in (400, 422) and self.dialect.drop(said, sent, self._text_of is not None):
                answer.resent += 1
                continue
            answer.status, answer.message = f"{REJECTED}:http_{status}", f"{status} {said}"
            answer.finish_s = self._now_s()
            return

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
        """Returns status and words of a refusal."""
        async with self._http.stream("POST", "/v1/completions", content=body) as reply:
            if reply.status_code != 200:
                return reply.status_code, _said(await reply.aread())
            reason, ended = None, False
            async for data in _events(reply):
                now = self._now_s()
                if data == b"[DONE]":
                    ended = True
                    break
                try:
                    event = _decode(data)
                except msgspec.DecodeError:
                    answer.message = f"not JSON: {data[:60]!r}"
                    break
                if "error" in event:
                    answer.message = _said(data)
                    break
                for choice in event.get("choices") or ():
                    why = choice.get("finish_reason")
                    # A last piece without text only says why it ended; any other stands for a token at least.
                    if choice.get("text") or not why:
                        answer.chunk_s.append(now)
                    if why:
                        reason, answer.finish_s = why, now
                if usage := event.get("usage"):
                    _count(answer, usage)
        if reason in ("stop", "length") or (ended and reason is None and answer.chunk_s):
            answer.status = FINISHED
            if answer.finish_s != answer.finish_s:
                answer.finish_s = answer.chunk_s[-1]
        else:
            answer.status = f"{ABORTED}:{reason or ('error' if answer.message else 'cut_off')}"
            answer.finish_s = self._now_s()
            self.dialect.ids_taken |= self.dialect.token_ids
        return None


async def _events(reply: httpx2.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    rest = b""
    async for block in reply.aiter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _count(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens = usage.get("prompt_tokens")
    answer.output_tokens = usage.get("completion_tokens")
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _said(body: bytes) -> str:
    """The message in an error's body, on one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(msgspec.DecodeError):
        found: Any = _decode(body)
        if isinstance(found, dict):
            error = found.get("error", found)
            message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
            text = str(message) if message is not None else text
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
