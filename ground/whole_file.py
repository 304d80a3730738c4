"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ground.errors import InputError

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """The hidden sibling, on the same file system, in which a file or folder is put together before it is renamed."""
    return path.with_name(f".{path.name}{PARTIAL}")


def write_whole(path: Path, text: str, error: type[Exception] = InputError) -> None:
    """Write a file of UTF-8 text, and the folders above it. Raises ``error`` in one line where that cannot be done."""
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise error(f"{path}: cannot be written: {problem.strerror or problem}") from problem
