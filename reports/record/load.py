"""Runs as a user names them: folders of records, or folders that hold several, each under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, read_record
from reports.record.schema import META_FILE


def load_runs(folders: Sequence[str | Path], mixed_traces: bool = False) -> dict[str, RunRecord]:
    """The records in `folders` by the name to show, in the order given (in a folder of runs: alphabetical).

    A run is called what its meta.json says. Where two would be called alike, all are called by the shortest end of their
    paths that tells them apart.

    Raises `RecordError` for a folder that is no run and holds none, a record that cannot be read, a folder given twice, and,
    unless `mixed_traces`, for runs of differently named traces.
    """
    found: dict[Path, RunRecord] = {}
    for folder in map(Path, folders):
        for run in run_folders(folder):
            if run.resolve() in {path.resolve() for path in found}:
                raise RecordError(f"{run}: given twice")
            found[run] = read_record(run)
    records = dict(zip(names_to_show(found), found.values(), strict=True))
    if not mixed_traces:
        _same_trace(records)
    return records


def names_to_show(found: Mapping[Path, RunRecord]) -> list[str]:
    """Names of runs by folder: those of their meta.json, or, where two are called alike, ends of their paths."""
    names = [record.name for record in found.values()]
    return told_apart(list(found)) if len(set(names)) < len(names) else names


def run_folders(folder: Path) -> list[Path]:
    """`folder` itself if it is a run, else the runs directly in it.

    Raises `RecordError` if there is none.
    """
    if (folder / META_FILE).is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{META_FILE}")) if folder.is_dir() else []
    if not runs:
        what = "no such folder" if not folder.exists() else "not a folder" if not folder.is_dir() else "not a run"
        raise RecordError(f"{folder}: {what}" + (f": it holds no {META_FILE}" if folder.is_dir() else ""))
    return runs


def trace_of(record: RunRecord) -> tuple[str | None, str | None]:
    """Name and sha256 of the trace a run served; None where the record does not say."""
    trace: Any = record.meta.get("trace")
    if isinstance(trace, Mapping):
        return trace.get("name") or None, trace.get("sha256") or None  # an imported run may not know either
    return (str(trace) if trace else None), None


def _same_trace(records: Mapping[str, RunRecord]) -> None:
    (first, base), *others = records.items()
    for name, record in others:
        one, other = trace_of(base)[0], trace_of(record)[0]
        if one and other and one != other:
            raise RecordError(
                f"{name} served the trace {other}, {first} served {one}: runs of different traces do not compare"
                " (--mixed-traces reports on them all the same)"
            )


def told_apart(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")
