"""What meta.json holds, whoever made the run: each kind of run fills in its part (docs/run-record.md)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traces import Trace

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGE = "llm-workbench"
"""What the package index calls us."""


def run_meta(
    *,
    name: str,
    command: str,
    trace: Mapping[str, Any],
    model: str,
    gpu: str,
    gpus: int | None,
    simulated: bool,
    settings: DataclassInstance,
    found: Mapping[str, Any],
    ran_on: tuple[str, ...],
    interrupted: bool,
    totals: Mapping[str, Any],
    hardware: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Meta of one run. ``found`` replaces settings by what was used in the end, and adds those of this kind of run;
    ``ran_on`` are the packages beside numpy whose versions count; ``hardware`` and ``more`` are what only this kind has."""
    return {
        "name": name,
        "command": command,
        "trace": dict(trace),
        "model": model,
        "hardware": {"gpu": gpu, "gpus": gpus, "simulated": simulated, **(hardware or {})},
        "settings": {**dataclasses.asdict(settings), **found},
        "versions": versions(*ran_on),
        "interrupted": interrupted,
        "totals": dict(totals),
        **more,
    }


def trace_meta(trace: Trace, sha256: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What a record says of the trace it was made from, its reader's notes and these."""
    return {
        "name": trace.info.name,
        "format": trace.info.format,
        "sha256": sha256,
        "notes": [*trace.info.notes, *notes],
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of the workbench, Python, numpy and these packages."""
    return {
        "workbench": importlib.metadata.version(PACKAGE),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("numpy", *packages)},
    }
