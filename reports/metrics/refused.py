"""Requests of a run that could never be served: too long for the context or for the KV pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reports.record.run_record import RunRecord
from reports.record.schema import REJECTED


@dataclass(frozen=True)
class Refused:
    """Number of refused requests, and a sentence about them without its full stop."""

    requests: int
    of: int
    sentence: str

    @property
    def everything(self) -> bool:
        """True where nothing at all could be served."""
        return self.requests == self.of


def is_refused(status: str) -> bool:
    """Tell whether a request of this status was turned away for good."""
    return status.partition(":")[0] == REJECTED


def refused(record: RunRecord, under: str = "") -> Refused | None:
    """Describe the requests of a run that could never be served; None if there are none."""
    column = record.requests
    statuses = column["status"]
    lost = [row for row, status in enumerate(statuses) if is_refused(status)]
    if not lost:
        return None
    settings = record.meta.get("settings") or {}
    first = lost[0]
    why = Counter(statuses[row].partition(":")[2] or REJECTED for row in lost)
    own = statuses[first].partition(":")[2] or REJECTED
    others = "".join(f", {count:,} {what}" for what, count in why.items() if what != own)
    limits = ", ".join(f"{name} {settings[name]}" for name in ("kv_tokens", "max_context") if settings.get(name))
    return Refused(
        len(lost),
        len(statuses),
        f"{len(lost)} of {len(statuses)} requests can never be served{f' under {under}' if under else ''}: "
        f"{column['request_id'][first]} with {column['input_tokens'][first]} input tokens is {own}"
        f"{others}{f' ({limits})' if limits else ''}",
    )
