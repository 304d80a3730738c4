"""/generate: token ids beside the text. It takes SGLang's names beside this server's own.

A request that uses one of SGLang's own names is streamed as SGLang does: every event has all of the text and the ids so far.
Any other gets what is new with each event, which is less work for a long answer.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import msgspec

from workbench.serving.chunks import Chunk, LogprobText
from workbench.serving.http.openai_api import Shape, chat_logprobs, finish_reason
from workbench.serving.open_request import OpenRequest
from workbench.serving.refusals import bad_value
from workbench.serving.requests import check_id
from workbench.serving.sampling_params import Count, Counts, Sampling, count


class GenerateSampling(Sampling, kw_only=True, forbid_unknown_fields=True):
    """``sampling_params``."""

    logprobs: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    no_stop_trim: bool | None = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /generate."""

    where: ClassVar[str] = "generate"
    parts: ClassVar[dict[str, Any]] = {"sampling_params": GenerateSampling}
    input_ids: list[int] | None = None
    text: str | None = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    rid: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None


def speaks_sglang(asked: GenerateRequest) -> bool:
    """Return whether a request uses a name that only SGLang has for it."""
    sampling = asked.sampling_params or GenerateSampling()
    names = (
        asked.rid,
        asked.return_logprob,
        asked.logprob_start_len,
        asked.top_logprobs_num,
        asked.return_text_in_logprobs,
        sampling.max_new_tokens,
        sampling.min_new_tokens,
    )
    return any(name is not None for name in names)


def counts_of(asked: GenerateRequest, default_max_tokens: int) -> Counts:
    """Return the counts of a request, by either of their names.

    Raises Refusal where two names of one thing differ, for log probabilities of the prompt, and for alternatives to
    log probabilities that were not asked for.
    """
    given = asked.sampling_params or GenerateSampling()
    most = count(default_max_tokens, max_tokens=given.max_tokens, max_new_tokens=given.max_new_tokens)
    least = count(0, min_tokens=given.min_tokens, min_new_tokens=given.min_new_tokens)
    logprobs = None if given.logprobs is None else count(0, logprobs=given.logprobs)
    if asked.top_logprobs_num and not asked.return_logprob:
        raise bad_value("top_logprobs_num", "needs return_logprob to be true")
    if asked.return_logprob:
        logprobs = count(0, logprobs=given.logprobs, top_logprobs_num=asked.top_logprobs_num)
        if asked.top_logprobs_num is None and given.logprobs is None:
            logprobs = Count("return_logprob", 0)
        if asked.logprob_start_len not in (None, -1):
            raise bad_value(
                "logprob_start_len",
                f"{asked.logprob_start_len} asks for log probabilities of the prompt, "
                "which are not supported; -1 is those of the output",
                "unsupported_parameter",
            )
    return Counts(most, least, logprobs)


def with_request_id(asked: GenerateRequest) -> GenerateRequest:
    """Return the request with its id under this server's name for it. Raises Refusal where the two names differ."""
    if asked.rid is None:
        return asked
    if asked.request_id not in (None, asked.rid):
        raise bad_value("rid", "is another name of request_id, and they differ")
    return msgspec.structs.replace(asked, request_id=check_id("rid", asked.rid))


class GenerateShape(Shape):
    """One sequence, in both vocabularies."""

    def __init__(self, request: OpenRequest, model: str, asked: GenerateRequest) -> None:
        super().__init__(request, model)
        self._asked = asked
        self._so_far = speaks_sglang(asked)
        self._text = ""
        self._ids: list[int] = []
        self._found: list[LogprobText] = []

    def _head(self) -> dict[str, Any]:
        return {"id": self.request.id, "model": self.model}

    def _whole(
        self, texts: list[str], tokens: list[list[int]], logprobs: list[list[LogprobText]], ends: list[Chunk]
    ) -> dict[str, Any]:
        body = self._body(texts[0], tokens[0], logprobs[0], ends[0])
        return {**self._head(), **body, "usage": self.usage.as_json()}

    def _pieces(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        text, ids, found = chunk.text, chunk.token_ids, chunk.logprobs or []
        if not (ids or text or chunk.kind):
            return []
        if self._so_far:
            self._text += text
            self._ids += ids
            self._found += found
            text, ids, found = self._text, self._ids, self._found
        piece = {**self._head(), **self._body(text, ids, found, chunk)}
        if chunk.kind:
            piece["usage"] = self.usage.as_json()
        return [piece]

    def _body(self, text: str, tokens: list[int], logprobs: list[LogprobText], end: Chunk) -> dict[str, Any]:
        body: dict[str, Any] = {
            "output_ids": tokens,
            "text": text,
            "finish_reason": finish_reason(end),
            "stop_reason": end.stop_reason,
            "meta_info": self._meta(logprobs, end),
        }
        if logprobs:
            body["logprobs"] = chat_logprobs(logprobs)
        return body

    def _meta(self, logprobs: list[LogprobText], end: Chunk) -> dict[str, Any]:
        """SGLang's account of the answer so far."""
        written = self._written[0]
        reason: dict[str, Any] | None = None
        if end.kind == "length":
            reason = {"type": "length", "length": written}
        elif end.kind == "stop":
            reason = {"type": "stop", "matched": end.stop_reason}
        elif end.kind:
            reason = {"type": "abort", "message": end.detail}
        meta: dict[str, Any] = {
            "id": self.request.id,
            "finish_reason": reason,
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": written,
            "cached_tokens": end.cached_tokens,
        }
        if end.kind:
            meta["e2e_latency"] = time.monotonic() - self.request.arrival_s
        if self._asked.return_logprob:
            spelled = bool(self._asked.return_text_in_logprobs)
            meta["input_token_logprobs"] = []
            meta["output_token_logprobs"] = [
                [item.logprob, item.token_id, item.token if spelled else None] for item in logprobs
            ]
            if self._asked.top_logprobs_num:
                meta["input_top_logprobs"] = []
                meta["output_top_logprobs"] = [
                    [
                        [value, i, text if spelled else None]
                        for i, (text, _, value) in zip(item.top_ids, item.top, strict=True)
                    ]
                    for item in logprobs
                ]
        return meta
