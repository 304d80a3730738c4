"""A reader of text that comes in pieces: parsers are generators that go on when there is more of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from itertools import chain

from workbench.serving.outputs.pieces import Arguments, CallBegun, Content, Part, Reasoning

Reading = Generator[None, None, None]
"""Yields where it needs more text."""
_SPACE = " \t\r\n"
MAX_HELD = 1 << 16
"""Characters of what may be a call, and has not named its tool yet."""


class Reader:
    """Text so far that nobody has taken, and the parts that were made of it."""

    def __init__(self, apart: bool = True) -> None:
        """``apart``: reasoning is no content."""
        self._apart = apart
        self.text = ""
        self.closed = False
        self.calls = 0
        """Calls begun."""
        self._parts: list[Part] = []

    def feed(self, text: str) -> None:
        self.text += text

    def take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # -- what parsers make -------------------------------------------------------------------------------------------

    def content(self, text: str) -> None:
        if text:
            self._parts.append(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._parts.append(Reasoning(text) if self._apart else Content(text))

    def begin(self, name: str) -> None:
        self._parts.append(CallBegun(self.calls, name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """Go on with the arguments of the call that was begun last."""
        if text:
            self._parts.append(Arguments(self.calls - 1, text))

    # -- what parsers take -------------------------------------------------------------------------------------------

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def until(self, *markers: str, to: Callable[[str], object]) -> Generator[None, None, str]:
        """Give ``to`` the text before the first of the markers, as it comes; returns the marker, which is taken, too, or
        nothing at the end of the text."""
        while True:
            found = [(at, -len(marker), marker) for marker in markers if (at := self.text.find(marker)) >= 0]
            if found:
                at, _, marker = min(found)
                before = self.take(at)
                self.take(len(marker))
                to(before)
                return marker
            if self.closed:
                to(self.take(len(self.text)))
                return ""
            held = max(_beginning(self.text, marker) for marker in markers)
            to(self.take(len(self.text) - held))
            yield

    def space(self) -> Generator[None, None, str]:
        """Take white space; returns it."""
        taken = ""
        while True:
            rest = self.text.lstrip(_SPACE)
            taken += self.take(len(self.text) - len(rest))
            if rest or self.closed:
                return taken
            yield

    def begins_with(self, *markers: str) -> Generator[None, None, str]:
        """Return which of the markers the text begins with, or nothing, as soon as that is certain. Takes nothing."""
        while True:
            for marker in markers:
                if self.text.startswith(marker):
                    return marker
            if self.closed or not any(marker.startswith(self.text) for marker in markers):
                return ""
            yield

    def value(self, to: Callable[[str], object]) -> Generator[None, None, bool]:
        """Give ``to`` a JSON value, as it comes; returns whether it came to its end."""
        depth, quoted, escaped, begun = 0, False, False, False
        while True:
            for at, character in enumerate(self.text):
                if quoted:
                    if escaped:
                        escaped = False
                    elif character == "\\":
                        escaped = True
                    elif character == '"':
                        quoted = False
                        if not depth:
                            to(self.take(at + 1))
                            return True
                elif character == '"':
                    quoted = begun = True
                elif character in "{[":
                    depth, begun = depth + 1, True
                elif character in "}]":
                    if not depth:  # of what is around it: the end of a number, or of a word
                        to(self.take(at).rstrip(_SPACE))
                        return begun
                    depth -= 1
                    if not depth:
                        to(self.take(at + 1))
                        return True
                elif not depth and (character == "," or (character in _SPACE and begun)):
                    to(self.take(at))
                    return begun
                elif character not in _SPACE:
                    begun = True
            # A piece may end anywhere; what was looked at is not looked at again.
            to(self.take(len(self.text)))
            if self.closed:
                return begun and not depth and not quoted
            yield


def _beginning(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker``."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def call_object(
    reader: Reader, keys: tuple[str, ...], known: Callable[[str], bool] = lambda name: True
) -> Generator[None, None, str | None]:
    """Read ``{"name": ..., KEY: {...}}``, KEY one of ``keys``, as a call, whose arguments go on as they come once its
    name is there.

    Returns None where it was one, else the text that was taken, which is none.
    """
    taken: list[str] = []
    name: str | None = None
    begun = False
    arguments: list[str] = []

    def both(text: str) -> None:
        taken.append(text)
        if begun:
            reader.arguments(text)
        else:
            arguments.append(text)

    taken.append(reader.take(1))  # the brace
    while True:
        taken.append((yield from reader.space()))
        if reader.text[:1] == "}":
            taken.append(reader.take(1))
            break
        if reader.text[:1] == ",":
            taken.append(reader.take(1))
            continue
        parts: list[str] = []
        if reader.text[:1] != '"' or not (yield from reader.value(parts.append)):
            return None if begun else "".join(chain(taken, parts))
        taken += parts
        key = _text("".join(parts))
        taken.append((yield from reader.space()))
        if reader.text[:1] != ":":
            return None if begun else "".join(taken)
        taken.append(reader.take(1))
        taken.append((yield from reader.space()))
        parts = []
        if key in keys:
            if name is not None and not begun and reader.text[:1] == "{":
                begun = True
                reader.begin(name)
            whole = yield from reader.value(both)
        else:
            whole = yield from reader.value(parts.append)
            taken += parts
            if key == "name":
                name = _text("".join(parts))
                if name is not None and not known(name):
                    return "".join(taken)
        if not whole:
            return None if begun else "".join(taken)
        if not begun and sum(map(len, taken)) > MAX_HELD:
            return "".join(taken)
    if begun:
        return None
    if name is None:
        return "".join(taken)
    reader.begin(name)
    text = "".join(arguments)
    reader.arguments("{}" if text in ("", "null") else _text(text) or text)
    return None


def _text(value: str) -> str | None:
    """Return a JSON string as text; None for another value, and for one with half of a surrogate pair, which is no text."""
    try:
        found = json.loads(value)
        if not isinstance(found, str):
            return None
        found.encode()
    except (ValueError, RecursionError):
        return None
    return found
