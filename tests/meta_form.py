"""What docs/run-record.md says of meta.json, as a check that the tests of every kind of run share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs/run-record.md"
ALWAYS = {"name", "command", "trace", "model", "hardware", "settings", "versions", "totals", "interrupted"}
"""Keys that every kind of run has."""


def documented_keys() -> set[str]:
    """First column of the table under `## meta.json`."""
    text = DOCUMENT.read_text().split("## meta.json")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def check_meta(meta: dict[str, Any], imported: bool = False) -> None:
    """Assert that a record has the keys of every run, and none that is not documented."""
    assert ALWAYS <= set(meta) <= documented_keys()
    assert {"name", "format", "sha256", "notes"} == set(meta["trace"])
    assert {"gpu", "gpus", "simulated"} <= set(meta["hardware"])
    assert {"requests", "ended", "iterations"} <= set(meta["totals"])
    if not imported:
        assert {"workbench", "python", "numpy"} <= set(meta["versions"])
    assert not {name for name in meta["versions"] if name.startswith("llm-")}
