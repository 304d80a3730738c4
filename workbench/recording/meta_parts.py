"""Parts of a ``RunMeta`` that are made alike for every kind of run of ours."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports.record.meta import TraceMeta
from traces import Trace
from workbench.scheduler.settings import UNRECORDED

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGE = "llm-workbench"
"""What the package index calls us."""


def settings_used(settings: DataclassInstance, **found: Any) -> dict[str, Any]:
    """The settings as they were used in the end: ``found`` replaces some, and adds those of this kind of run."""
    hidden = {field.name for field in dataclasses.fields(settings) if UNRECORDED in field.metadata}
    used = {name: value for name, value in dataclasses.asdict(settings).items() if name not in hidden}
    return {**used, **found}


def trace_meta(trace: Trace, sha256: str, notes: Sequence[str] = ()) -> TraceMeta:
    """Return what a record says of the trace it was made from, its reader's notes and these."""
    return TraceMeta(trace.info.name, trace.info.format, sha256, [*trace.info.notes, *notes])


def versions(*packages: str) -> Mapping[str, str]:
    """Versions of the workbench, Python, numpy and these packages."""
    return {
        "workbench": importlib.metadata.version(PACKAGE),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("numpy", *packages)},
    }
