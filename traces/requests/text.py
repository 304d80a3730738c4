"""Text into token ids, with the `tokenizers` library, which is imported only when a trace holds text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from traces.files.errors import TraceError
from traces.files.source import Source
from traces.files.values import MISSING


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode(self, sequence: str, *, add_special_tokens: bool = ...) -> Any:
        """An object whose `ids` are the token ids."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a model's folder.

    Raises TraceError when there is none, it is broken, or the `tokenizers` package is not installed.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TraceError(file, 0, "", "no such tokenizer file")
    try:
        import tokenizers
    except ImportError:
        raise TraceError(file, 0, "", "reading text needs the package 'tokenizers' (pip install tokenizers)") from None
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as fault:  # The library raises nothing more precise.
        raise TraceError(file, 0, "", f"is not a tokenizer: {str(fault).splitlines()[0]}") from None


def encode(tokenizer: Tokenizer | None, source: Source, line: int, field: str, value: Any) -> np.ndarray:
    """Token ids of a text, no special tokens added: int32.

    Raises TraceError when the value is not text or there is no tokenizer to read it with.
    """
    if value is MISSING or value is None:
        raise source.error(line, field, "is missing")
    if not isinstance(value, str):
        raise source.error(line, field, f"'{value}' is not text")
    if tokenizer is None:
        fault = source.error(
            line, field, "is text, which takes a tokenizer to read: give --tokenizer FOLDER|tokenizer.json"
        )
        fault.of_a_row = False
        raise fault
    return np.array(tokenizer.encode(value, add_special_tokens=False).ids, dtype=np.int32)


def render_messages(source: Source, line: int, field: str, value: Any) -> str:
    """A chat as plain text, `role: content` paragraphs: no model's template, but about the right number of tokens.

    Raises TraceError when it is not a list of messages with text as content.
    """
    if not isinstance(value, list) or not value:
        raise source.error(line, field, "is not a list of messages")
    parts = []
    for number, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise source.error(line, f"{field}[{number}]", "is not a message with a role and text as its content")
        parts.append(f"{message['role']}: {message['content']}")
    return "\n\n".join(parts)
