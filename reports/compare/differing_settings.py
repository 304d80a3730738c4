"""The settings of runs side by side: what they share and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ground.json_file import json_phrase
from reports.record.run_record import RunRecord

_SHOWN = (
    "model",
    "weights",
    "hardware",
    "trace",
    "settings",
    "parity",
    "kv_budget",
    "host_model",
    "front_end",
    "versions",
    "totals",
    "interrupted",
)

_FOUND = ("kv_budget", "totals", "interrupted")
"""Parts of those that follow from a run rather than lead to it."""


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested dictionaries as `a.b.c: text`, by name within each: a record that was read back has them in that order."""
    if isinstance(value, dict):
        flattened: dict[str, str] = {}
        for key, inner in sorted(value.items()) if name else value.items():
            flattened |= flat(inner, f"{name}.{key}" if name else str(key))
        return flattened
    return {name: value if isinstance(value, str) else json_phrase(value)}


def compare_settings(records: Mapping[str, RunRecord]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Settings that differ, with the text of each run in order ("" where it has none), and those all runs share.

    The trace's notes are left out: they are prose, see `notes`.
    """
    rows = _rows([record.meta for record in records.values()], _SHOWN)
    differing = {name: texts for name, texts in rows.items() if len(set(texts)) > 1}
    shared = {name: texts[0] for name, texts in rows.items() if name not in differing}
    return differing, shared


def differing_settings(metas: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """List the settings that were chosen differently: the first part of `compare_settings` without what the runs counted."""
    rows = _rows(metas, tuple(part for part in _SHOWN if part not in _FOUND))
    return {name: texts for name, texts in rows.items() if len(set(texts)) > 1}


def _rows(metas: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> dict[str, list[str]]:
    runs = [flat({part: meta[part] for part in parts if part in meta}) for meta in metas]
    for run in runs:
        run.pop("trace.notes", None)
    names = list(dict.fromkeys(name for run in runs for name in run))
    return {name: [run.get(name, "") for run in runs] for name in names}


def notes(records: Mapping[str, RunRecord]) -> list[str]:
    """Collect the notes of the traces' readers and of the cost models, of pools too; each note once, with the runs that it
    is of where that is not all."""
    found: dict[str, dict[str, None]] = {}
    for name, record in records.items():
        trace = record.meta.get("trace")
        of_trace = trace.get("notes") if isinstance(trace, Mapping) else None
        pools = [pool for pool in record.meta.get("pools") or () if isinstance(pool, Mapping)]
        of_pools = [f"pool {pool.get('name')}: {note}" for pool in pools for note in _texts(pool.get("cost_notes"))]
        for note in [*_texts(of_trace), *_texts(record.meta.get("cost_notes")), *of_pools]:
            found.setdefault(note, {})[name] = None
    return [note if len(runs) == len(records) else f"{', '.join(runs)}: {note}" for note, runs in found.items() if note]


def _texts(said: Any) -> list[str]:
    """What a record says in one text or in several."""
    return [said] if isinstance(said, str) else [str(text) for text in said or ()]
