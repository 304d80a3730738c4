"""Answers of the service, whatever protocol carries them: what is new about a sequence, piece by piece."""

from __future__ import annotations

import msgspec

FINISH_WORDS = {"aborted": "abort"}
"""What clients and metrics call a kind of end, where that is another word."""


class LogprobText(msgspec.Struct, array_like=True):
    """A token's log probability with the tokens as text."""

    token: str
    token_bytes: bytes
    logprob: float
    top: list[tuple[str, bytes, float]]
    token_id: int = -1
    top_ids: list[int] = []
    """Of ``top``."""
    offset: int = 0
    """Characters of the sequence's text before it, as :meth:`TextStream.offset` counts."""


class Chunk(msgspec.Struct, array_like=True):
    """Something new about a sequence."""

    sequence: int
    text: str
    token_ids: list[int]
    kind: str = ""
    """Why it ended: ``length``, ``stop``, ``aborted``, ``rejected`` or ``handed_over``; empty while it goes on."""
    detail: str = ""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[LogprobText] | None = None
    prompt_logprobs: list[LogprobText] | None = None
    """Of its prompt, from ``prompt_first`` on."""
    prompt_first: int = 0
