"""Notes on what a trace says that the settings of its run leave without effect."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.recording.recorder import RequestRow
from workbench.scheduler.config import PREFIX_POLICIES
from workbench.scheduler.settings import is_own
from workbench.settings.run_settings import RunSettings


def trace_notes(settings: RunSettings, rows: Iterable[RequestRow]) -> list[str]:
    """Say what the requests of a trace have that the policy does not heed, or lack that it would."""
    notes: list[str] = []
    rows = list(rows)
    priorities = {row.priority for row in rows}
    deadlines = settings.slo_ttft is not None or any(row.slo_ttft_s == row.slo_ttft_s for row in rows)
    custom = is_own(settings.policy)
    if settings.policy == "priority" and len(priorities) == 1:
        return [f"all requests have priority {priorities.pop()}: policy priority served them as fcfs does"]
    if settings.policy == "edf" and rows and not deadlines:
        return [
            "no request has a deadline (slo_ttft_s in the trace, or --slo-ttft): policy edf served them as fcfs does"
        ]
    if settings.policy in PREFIX_POLICIES and settings.cache == "none":
        notes.append(f"there is no prefix cache: policy {settings.policy} served them as fcfs does")
    if settings.policy != "priority" and not custom and len(priorities) > 1:
        notes.append(
            f"priorities of the trace have no effect under policy {settings.policy}; --policy priority follows them"
        )
    return notes
