"""What docs/run-record.md and ``RunMeta`` say of meta.json, as a check that the tests of every kind of run share."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from reports.record.meta import RUN_KINDS, HardwareMeta, PoolMeta, RunMeta, Totals, TraceMeta

DOCUMENT = Path(__file__).parents[1] / "docs/run-record.md"
PARTS: dict[str, type] = {"trace": TraceMeta, "hardware": HardwareMeta, "totals": Totals}
OWN = {
    "simulated": {
        "weights",
        "kv_budget",
        "host_model",
        "front_end",
        "cost_notes",
        "parity",
        "rests_on",
        "accuracy",
        "pools",
    },
    "replayed": {"weights"},
    "served": {"weights", "kv_budget", "recorded_at"},
    "observed": {"observed"},
    "imported": {"latency_from"},
}
"""Keys of each kind of run beside those that all have."""
ASKED_FOR = {"prices", "fleet"}
"""Keys of runs that were asked for what these are of."""
COUNTED = {
    "simulated": {"cut", "simulated_s"},
    "replayed": {"cut", "wall_s"},
    "served": {"traced", "wall_s"},
    "observed": {"cut", "wall_s", "failed", "pieces", "resent", "late_mean_s", "late_max_s"},
    "imported": set[str](),
}
"""Totals of each kind of run beside those that all have."""


def names(part: type, always: bool = False) -> set[str]:
    """Fields of a part; only those that every run fills in, if ``always``."""
    return {
        field.name
        for field in dataclasses.fields(part)
        if not always or field.default is field.default_factory is dataclasses.MISSING
    }


def documented() -> dict[str, str]:
    """Keys and meanings of the table under `## meta.json`."""
    text = DOCUMENT.read_text().split("## meta.json")[1].split("\n## ")[0]
    rows = [line.split("|", 2)[1:] for line in text.splitlines() if line.startswith("| `")]
    return {name: meaning for key, meaning in rows for name in re.findall(r"`(\w+)`", key)}


def check_meta(meta: dict[str, Any], kind: str) -> None:
    """Assert that a record has the keys of a kind of run, in all its parts, and none else."""
    assert meta["kind"] == kind and kind in RUN_KINDS
    own = OWN[kind]
    if kind == "served" and meta["hardware"]["simulated"]:
        own = own | {"cost_notes"}
    if (
        kind == "served" and "pools" in meta
    ):  # of a fleet: what pools differ in stands with them, a lost instance in fleet
        own = (own | {"pools"} | {"fleet"} & set(meta)) - set(meta["pools"][0])
    if meta["settings"].get("engine") == "workbench":
        own = own - {"parity"}
    if meta["settings"].get("front_end", "none") == "none":
        own = own - {"front_end"}
    assert set(meta) == names(RunMeta, always=True) | own
    assert set(meta["trace"]) == names(TraceMeta)
    for pool in meta.get("pools", ()):
        assert names(PoolMeta, always=True) <= set(pool) <= names(PoolMeta)
    assert set(meta["hardware"]) == names(HardwareMeta, always=True) | ({"url"} if kind == "observed" else set())
    assert set(meta["totals"]) == names(Totals, always=True) | COUNTED[kind]
    if kind != "imported":
        assert {"workbench", "python", "numpy"} <= set(meta["versions"])
    assert not {name for name in meta["versions"] if name.startswith("llm-")}
