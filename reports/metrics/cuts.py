"""Outputs that ended before the trace says: how many, by how many tokens, and what cut them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.record.run_record import RunRecord

CAUSES = {
    "trace": "the max_tokens of the trace",
    "max_tokens": "--max-tokens",
    "max_context": "the context",
    "kv_tokens": "the KV pool",
    "server": "the server",
}
"""Keys of ``totals.cut``, in words."""
_SETTING = {"max_tokens": "", "max_context": " tokens", "kv_tokens": " tokens"}


def cuts_of(record: RunRecord) -> dict[str, dict[str, int]] | None:
    """Look up ``requests`` cut and ``tokens`` not written, by cause; None where the record does not say."""
    totals = record.meta.get("totals")
    found = totals.get("cut") if isinstance(totals, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None


def cut_totals(record: RunRecord) -> tuple[int, int] | None:
    """Add up (requests, tokens) of all causes."""
    found = cuts_of(record)
    if found is None:
        return None
    return sum(of["requests"] for of in found.values()), sum(of["tokens"] for of in found.values())


def cut_lines(records: Mapping[str, RunRecord]) -> list[str]:
    """Write a sentence for each run and cause."""
    lines = []
    for name, record in records.items():
        settings: Mapping[str, Any] = record.meta.get("settings") or {}
        for cause, of in (cuts_of(record) or {}).items():
            lines.append(f"{name}: {cut_text(cause, of, settings)}.")
    return lines


def cut_text(cause: str, of: Mapping[str, int], settings: Mapping[str, Any] | None = None) -> str:
    """Say what one cause has cut, with the value that `settings` has for it."""
    value = settings.get(cause) if settings and cause in _SETTING else None
    what = CAUSES.get(cause, cause) + ("" if value is None else f" ({value:,}{_SETTING[cause]})")
    requests = "request was" if of["requests"] == 1 else "requests were"
    return f"{of['requests']:,} {requests} cut short by {what}: {of['tokens']:,} output tokens of the trace were not written"
