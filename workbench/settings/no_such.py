"""What is said of a setting that there is none of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def no_such_setting(name: str, among: Iterable[str]) -> str:
    """The sentence, with the names that come nearest; where none does, with where they are listed: they are too many."""
    near = get_close_matches(name, list(among), 3)
    hint = f"nearest: {', '.join(near)}" if near else "`workbench simulate --help` lists them"
    return f"{name}: no such setting; {hint}"
