"""JSON as we write it, and a JSON object in a file, or one line about why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.record.errors import RecordError


def json_text(value: Any) -> str:
    """`value` as JSON for people and programs. What is no number (NaN, infinity) does not exist there: null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path, error: type[Exception] = RecordError) -> dict[str, Any]:
    """The object in the file `path`. Raises `error` with one line."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: not a JSON object")
    return content
