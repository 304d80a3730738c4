"""Tokens to text, a few at a time: never half a character, and together exactly the text of all the tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream(Protocol):
    """An incremental decoding."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain with these tokens and was not before."""
        ...

    def finish(self) -> str:
        """The rest: what was held back for want of its next byte."""
        ...


class ByteStream:
    """For vocabularies whose tokens are bytes: an incremental UTF-8 decoder over them."""

    def __init__(self, table: Sequence[bytes], skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table, skipped = self._table, self._skipped
        return self._decoder.decode(b"".join(table[i] for i in token_ids if i < len(table) and i not in skipped))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class WindowStream:
    """For any other: decode a window of tokens with and without the new ones, and take the difference.

    The window starts at the tokens that were new last time, because how a token is spelled may depend on the one before it
    (a space that the first one loses, say). Text is held while it ends in a replacement character, which the next token may
    complete, and while the last token is a byte of a run, which is spelled only when the run is over.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], skipped: frozenset[int], byte_tokens: frozenset[int]
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._byte_tokens = byte_tokens
        self._window: list[int] = []
        self._told = 0
        """Tokens of the window whose text is out."""

    def push(self, token_ids: Sequence[int]) -> str:
        new = [i for i in token_ids if i not in self._skipped]
        if not new:
            return ""
        self._window += new
        if self._window[-1] in self._byte_tokens:
            return ""
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        del self._window[: self._told]
        self._told = len(self._window)
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._window = []
        self._told = 0
        return text

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._told]) if self._told else ""
        return self._decode(self._window)[len(before) :]


class StopMatcher:
    """Finds stop strings in text that comes in pieces.

    What may be the beginning of one is held back. Of several matches the one that is complete first counts, of those the
    longest, so the result does not depend on where the pieces are cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to give out, the stop string found or None). After one is found there is nothing more to ask."""
        if not self._stops:
            return text, None
        held = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = held.find(stop)
            if at >= 0:
                found = (at + len(stop), at, stop)
                best = found if best is None else min(best, found)
        if best is not None:
            self._held = ""
            return held[: best[1]], best[2]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
