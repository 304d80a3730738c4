"""Records as trace files have them."""

from __future__ import annotations

import json
from typing import Any


def json_lines(*records: dict[str, Any]) -> str:
    """A line for each record."""
    return "".join(json.dumps(record) + "\n" for record in records)
