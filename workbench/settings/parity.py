"""How far a preset decides as its engine does, as counted against recordings of it (``benchmarks/parity.py``)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ground.json_file import read_json
from workbench.scheduler.rules import EngineRules
from workbench.settings.loading import settings_from
from workbench.settings.run_settings import RunSettings

COUNTS = Path(__file__).parent / "parity.json"
"""By preset, and in it by recording: ``scenarios``, those ``equal``, ``steps``, and those before the first difference
(``equal_steps``)."""
RULES = (
    *("batching", "cache", "evict", "chunk_depth", "max_passed_over", "max_prefill_streak", "overlap_prefills"),
    *(field.name for field in fields(EngineRules)),
)
"""Settings that decide beside the sizes, which are a case's own."""


def parity_of(settings: RunSettings) -> str | None:
    """Say for a record how far its scheduler decides as its preset's engine does; None where that was never compared."""
    counts = read_json(COUNTS).get(settings.engine)
    if counts is None:
        return None
    scenarios, equal, steps, alike = (
        sum(of[name] for of in counts.values()) for name in ("scenarios", "equal", "steps", "equal_steps")
    )
    said = (
        f"{settings.engine}: {equal:,} of {scenarios:,} recorded scenarios decided alike, {alike:,} of {steps:,} batches "
        "before the first difference"
    )
    changed = changed_rules(settings)
    return said + (f"; here without its {', '.join(changed)}" if changed else "")


def changed_rules(settings: RunSettings) -> list[str]:
    """Those of :data:`RULES` in which a run is another than its preset."""
    preset = settings_from(None, {"engine": settings.engine})
    return [name for name in RULES if getattr(settings, name) != getattr(preset, name)]
