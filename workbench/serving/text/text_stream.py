"""Tokens to text, a few at a time: never half a character, and together exactly the text of all the tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
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

    def offset(self, token_id: int) -> int:
        """Characters of the text before a token that is about to be pushed. Where it goes on with a character that earlier
        tokens began, those before that character."""
        ...


class ByteStream:
    """An incremental UTF-8 decoder, for vocabularies whose tokens are bytes."""

    def __init__(self, table: Sequence[bytes], skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def push(self, token_ids: Sequence[int]) -> str:
        table, skipped = self._table, self._skipped
        text = self._decoder.decode(b"".join(table[i] for i in token_ids if i < len(table) and i not in skipped))
        self._characters += len(text)
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)

    def offset(self, token_id: int) -> int:
        begun = self._decoder.getstate()[0]
        piece = self._table[token_id] if token_id < len(self._table) and token_id not in self._skipped else b""
        if not begun or not piece or _goes_on(begun, piece):
            return self._characters
        return self._characters + len(begun.decode("utf-8", "replace"))


def _goes_on(begun: bytes, piece: bytes) -> bool:
    """Tell whether the first byte of a piece belongs to the character that the bytes before it have begun."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begun + piece[:1])
    except UnicodeDecodeError:
        return False
    return True


class WindowStream:
    """A window of tokens, decoded with and without the new ones, for any other vocabulary: the difference is what is new.

    The window starts at the tokens that were new last time, because how a token is spelled may depend on the one before it
    (a space that the first one loses, say). Text is held while it ends in a replacement character, which the next token may
    complete, and while the last token is a byte of a run, which is spelled only when the run is over.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], skipped: frozenset[int], byte_tokens: Mapping[int, int]
    ) -> None:
        """``byte_tokens``: the byte that a token is, of those that are one."""
        self._decode = decode
        self._skipped = skipped
        self._byte_tokens = byte_tokens
        self._window: list[int] = []
        self._told = 0
        """Tokens of the window whose text is out."""
        self._characters = 0

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
        self._characters += len(text)
        return text

    def offset(self, token_id: int) -> int:
        held = self._window[self._told :]
        if not held or token_id in self._skipped:
            return self._characters
        before = self._new_text()
        if token_id in self._byte_tokens:
            run = list(takewhile(self._byte_tokens.__contains__, reversed(held)))[::-1]
            if not run:
                return self._characters + len(before)
            # A run is spelled as a whole when it is over: as characters if it is some, and that is taken for granted here.
            written = codecs.getincrementaldecoder("utf-8")("replace")
            written.decode(bytes(self._byte_tokens[i] for i in run))
            begun = written.getstate()[0]
            cut = 0 if not begun or _goes_on(begun, bytes([self._byte_tokens[token_id]])) else 1
            return self._characters + len(self._new_text(len(begun))) + cut
        self._window.append(token_id)
        after = self._new_text()
        self._window.pop()
        if before.endswith(REPLACEMENT) and after.endswith(REPLACEMENT):
            before = before.rstrip(REPLACEMENT)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        return self._characters + len(list(same))

    def finish(self) -> str:
        text = self._new_text()
        self._window = []
        self._told = 0
        return text

    def _new_text(self, without: int = 0) -> str:
        """The text of what is held, without the last so many tokens."""
        before = self._decode(self._window[: self._told]) if self._told else ""
        return self._decode(self._window[: len(self._window) - without])[len(before) :]


class StopMatcher:
    """A search for stop strings in text that comes in pieces.

    What may be the beginning of one is held back. Of several matches the one that is complete first counts, of those the
    longest, so the result does not depend on where the pieces are cut.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """``include``: the stop string belongs to the text."""
        self._stops = tuple(stops)
        self._include = include
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
            return held[: best[0] if self._include else best[1]], best[2]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
