"""A JSON object in a file, or one line about why there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The object in a file. Raises ``error`` with one line."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    except ValueError as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: not a JSON object")
    return content
