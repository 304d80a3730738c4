"""Tables in the documents: between two markers, rewritten by the command that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def between_markers(page: Path, sections: Mapping[str, str]) -> str:
    """The text of a page with each section's between its two markers. Raises ValueError where one has none."""
    text = page.read_text()
    for name, section in sections.items():
        begin, end = (f"<!-- scoreboard {name}: {what} -->" for what in ("begin", "end"))
        if begin not in text or end not in text:
            raise ValueError(f"{page}: {begin} ... {end}: no such place")
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = f"{head}{begin}\n{section}\n{end}{tail}"
    return text
