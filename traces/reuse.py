"""The share of a trace's input that an unlimited prefix cache would serve."""

from __future__ import annotations

from collections.abc import Iterator

from traces.requests.content import TokenIds
from traces.requests.trace_request import TraceRequest

_PIECE_TOKENS = 16
"""Grain at which given token ids are compared; a shorter rest counts as not shared."""


class PrefixReuse:
    """Feeds on requests in order and says of each how many prompt tokens were there before.

    It treats every earlier request as finished, output included, and computes at least one token of each prompt. Sequences
    are followed segment by segment (a block, a span, a few given ids) and never turned into tokens.
    """

    def __init__(self) -> None:
        self._reach: dict[int, int] = {}
        """For a segment after a certain past: how many of its tokens have been seen."""

    def add(self, request: TraceRequest) -> int:
        """Prompt tokens of `request` that earlier ones have in common with it; then remember its own."""
        content = request.content
        if not isinstance(content, TokenIds) and content.blocks is None and request.session_id is None:
            return 0  # Shares nothing with anybody; a million of these must not fill the memory.
        limit = request.input_length - 1
        found, follows, past, at = 0, True, 0, 0
        for key, end in _segments(request):
            size = end - at
            past = hash((past, key))
            seen = self._reach.get(past, 0)
            if follows:
                common = max(0, min(seen, size, limit - at))
                found += common
                follows = common == size
            if seen < size:
                self._reach[past] = size
            at = end
        return found


def _segments(request: TraceRequest) -> Iterator[tuple[int | str | bytes | tuple[int | str, int], int]]:
    """(key, end position) of the pieces of prompt and output; equal keys after an equal past are equal tokens."""
    content = request.content
    end = request.input_length + request.output_length
    if isinstance(content, TokenIds):
        ids = [content.prompt] if content.output is None else [content.prompt, content.output]
        raw = b"".join(part.tobytes() for part in ids)
        grain = _PIECE_TOKENS * 4
        for number in range(len(raw) // grain):
            yield raw[number * grain : (number + 1) * grain], (number + 1) * _PIECE_TOKENS
        return
    at = 0
    if content.blocks is not None:
        blocks = content.blocks
        for block in blocks.ids[: -(-end // blocks.size)].tolist():
            at = min(at + blocks.size, end)
            yield (blocks.scope, block), at
    for number, (_, key) in enumerate(content.spans):
        stop = min(end, content.spans[number + 1][0]) if number + 1 < len(content.spans) else end
        if stop > at:
            yield key, stop
            at = stop
