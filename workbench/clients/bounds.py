"""Bounds on the tokens that a request of a trace writes, and what cut it below what the trace says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from traces import TraceRequest
from workbench.scheduler.config import DEFAULT_MAX_NEW_TOKENS

Cause = Literal["trace", "max_tokens", "max_context", "kv_tokens", "server"]
"""What cut an output: the trace's own max_tokens, --max-tokens, the context, the KV pool, or the server that was asked."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Most tokens that a request may write, and who would have cut it there."""

    tokens: int
    cause: Cause


def bound_of(request: TraceRequest, max_tokens: int | None, length_known: bool) -> Bound:
    """The trace's bound, else ``max_tokens`` if it was given, else one that cuts nothing: what a client would ask for that
    knows nothing of lengths, or more where the trace says more.

    With ``length_known`` the scheduler, or the server, is told when the model will stop.
    """
    if request.max_tokens is not None:
        bound = Bound(request.max_tokens, "trace")
    else:
        most = max(DEFAULT_MAX_NEW_TOKENS, request.output_length) if max_tokens is None else max_tokens
        bound = Bound(most, "max_tokens")
    return Bound(min(bound.tokens, request.output_length), bound.cause) if length_known else bound


def counted(cuts: Iterable[tuple[Cause, int]]) -> dict[str, Any]:
    """``totals.cut`` of a record, of (cause, tokens not written): requests and tokens by cause."""
    found: dict[str, dict[str, int]] = {}
    for cause, tokens in cuts:
        of = found.setdefault(cause, {"requests": 0, "tokens": 0})
        of["requests"] += 1
        of["tokens"] += tokens
    return found
