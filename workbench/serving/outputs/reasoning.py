"""How models write what they think before they answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from workbench.serving.outputs.reader import Reader, Reading
from workbench.serving.outputs.tool_formats import Parser


@dataclass(frozen=True)
class ReasoningFormat:
    """Two marks around it."""

    begin: str
    end: str
    assumed: bool = False
    """An answer thinks first, though neither it nor its prompt has the first mark."""
    special: bool = False
    """Its marks are special tokens, which text usually goes without."""

    def begun(self, prompt: str) -> bool:
        """Return whether the answer to a prompt, which is the end of a rendered conversation, goes on with thinking."""
        end = prompt.rstrip()
        return end.endswith(self.begin) or (self.assumed and not end.endswith(self.end))


def thinking(form: ReasoningFormat, begun: bool, then: Parser) -> Parser:
    """Return a parser of reasoning, whose marks are no part of it, and of the answer that follows by ``then``."""

    def parse(reader: Reader, names: Collection[str]) -> Reading:
        space = yield from reader.space()
        if (yield from reader.begins_with(form.begin)):
            reader.take(len(form.begin))
        elif not begun:
            reader.text = space + reader.text
            yield from then(reader, names)
            return
        yield from reader.space()
        held = _WithoutLastSpace(reader)
        if (yield from reader.until(form.end, to=held.add)):
            yield from reader.space()
        yield from then(reader, names)

    return parse


class _WithoutLastSpace:
    """White space is given on when something follows it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._held = ""

    def add(self, text: str) -> None:
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._reader.reasoning(kept)


REASONING: dict[str, ReasoningFormat | None] = {
    "deepseek-r1": ReasoningFormat("<think>", "</think>", assumed=True),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]", special=True),
    "gpt-oss": None,
}
"""By the names that ``--reasoning-parser`` has for them; None: the format of its calls tells reasoning apart."""
