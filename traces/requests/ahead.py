"""Tokens of requests that are read a little ahead, made for several at a time.

A prompt of a thousand tokens is hashed in less time than it takes to call numpy for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from traces.requests.content import PIECE_TOKENS, Synthetic, tokens_of_keys
from traces.requests.trace_request import TraceRequest

MOST_REQUESTS = 64
"""Read ahead, if they are short."""
LONG_TOKENS = PIECE_TOKENS // 4
"""From here on a request gains nothing by company."""


def with_tokens(
    trace: Iterable[TraceRequest], vocab_size: int, seed: int = 0
) -> Iterator[tuple[TraceRequest, tuple[np.ndarray, np.ndarray] | None]]:
    """Each request with what :meth:`TraceRequest.tokens` returns, or with None where that is better asked for later: many
    tokens, those of a session, which may have long to wait, and those that the trace has itself.

    What reading the trace raises is raised after the requests before it.
    """
    for window in _windows(trace):
        keys = [_key(request) for request in window]
        whole = [request.input_length + request.output_length for request in window]
        made = iter(tokens_of_keys([pair for pair in zip(keys, whole, strict=True) if pair[0]], vocab_size, seed))
        for request, key in zip(window, keys, strict=True):
            if key:
                tokens = next(made)
                yield request, (tokens[: request.input_length], tokens[request.input_length :])
            else:
                yield request, None


def _key(request: TraceRequest) -> str:
    """Key of the one span that makes up a request; empty where its tokens are not made ahead."""
    content = request.content
    if request.session_id is not None or not isinstance(content, Synthetic) or content.blocks or len(content.spans) > 1:
        return ""
    return content.spans[0][1] if request.input_length + request.output_length < LONG_TOKENS else ""


def _windows(trace: Iterable[TraceRequest]) -> Iterator[list[TraceRequest]]:
    window: list[TraceRequest] = []
    tokens = 0
    try:
        for request in trace:
            window.append(request)
            tokens += request.input_length + request.output_length
            if tokens >= PIECE_TOKENS or len(window) == MOST_REQUESTS:
                yield window
                window, tokens = [], 0
    except Exception:
        yield window
        raise
    yield window
