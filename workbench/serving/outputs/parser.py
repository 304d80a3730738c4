"""An output told apart while it comes."""

from __future__ import annotations

from collections.abc import Collection

from workbench.serving.outputs.pieces import Part
from workbench.serving.outputs.reader import Reader, Reading
from workbench.serving.outputs.tool_formats import Parser


class OutputParser:
    """The parts of one output. However its text is cut into pieces, they are together the same."""

    def __init__(self, parser: Parser, names: Collection[str] = (), apart: bool = True) -> None:
        """``names``: of the tools; ``apart``: reasoning is no content."""
        self._reader = Reader(apart)
        self._reading: Reading | None = parser(self._reader, names)

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._reader.calls

    def push(self, text: str) -> list[Part]:
        """Return the parts that are certain with this text."""
        if not text:
            return []
        self._reader.feed(text)
        return self._go_on()

    def finish(self) -> list[Part]:
        """Return the rest, now that nothing follows."""
        self._reader.closed = True
        return self._go_on()

    def _go_on(self) -> list[Part]:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
        if self._reading is None:
            self._reader.content(self._reader.take(len(self._reader.text)))
        return self._reader.take_parts()
