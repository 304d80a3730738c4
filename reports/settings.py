"""The settings of runs side by side: what they share and where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reports.record import RunRecord

_SHOWN = ("model", "hardware", "trace", "settings", "kv_budget", "host_model", "versions", "totals", "interrupted")


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested dictionaries as `a.b.c: text`."""
    if isinstance(value, Mapping):
        flattened: dict[str, str] = {}
        for key, inner in value.items():
            flattened |= flat(inner, f"{name}.{key}" if name else str(key))
        return flattened
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def compare_settings(records: Mapping[str, RunRecord]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Settings that differ, with the text of each run in order ("" where it has none), and those all runs share.

    The trace's notes are left out: they are prose, see `notes`.
    """
    runs = [flat({part: record.meta[part] for part in _SHOWN if part in record.meta}) for record in records.values()]
    for run in runs:
        run.pop("trace.notes", None)
    names = list(dict.fromkeys(name for run in runs for name in run))
    rows = {name: [run.get(name, "") for run in runs] for name in names}
    differing = {name: texts for name, texts in rows.items() if len(set(texts)) > 1}
    shared = {name: texts[0] for name, texts in rows.items() if name not in differing}
    return differing, shared


def notes(records: Mapping[str, RunRecord]) -> list[str]:
    """What the readers of the traces want to be known; each note once."""
    found: list[str] = []
    for record in records.values():
        trace = record.meta.get("trace")
        said = trace.get("notes") if isinstance(trace, Mapping) else None
        found += [said] if isinstance(said, str) else list(said or [])
    return list(dict.fromkeys(str(note) for note in found if note))
