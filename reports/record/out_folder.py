"""The check of an output folder, and what `--force` removes from it: our own output and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from ground.errors import InputError
from ground.json_file import read_json
from ground.whole_file import PARTIAL
from reports.record.errors import RecordError
from reports.record.schema import (
    FORMAT,
    INSTANCES_PARTIAL,
    META_FILE,
    PAGE_FILE,
    RECORD_FILES,
    TRACE_FILE,
    TRACE_PARTIAL,
)

PAGE_MARK = b'<meta name="generator" content="workbench'
"""Stands near the top of every page we write: how we know one again."""


def prepare_out(folder: str | Path, force: bool = False, advice: str = "--force replaces an earlier run") -> None:
    """Make `folder` an empty folder to write runs into.

    Without `force` it must be missing or empty. With `force` earlier output of ours is removed: run folders (which
    say so in their meta.json), report.html pages of ours, and what an interrupted write left. If anything else is in
    there, nothing at all is removed. `advice` is what whoever asks can do about a folder that is not empty.

    Raises `RecordError` if the folder may not be used.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RecordError(f"{folder}: exists and is not a folder")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if entries and not force:
        raise RecordError(f"{folder}: exists and is not empty ({advice})")
    strangers = [str(path.relative_to(folder)) for path in _strangers(folder, entries)]
    if strangers:
        named = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise RecordError(f"{folder}: nothing removed: it holds {named}, which no workbench run wrote")
    try:
        for path in entries:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RecordError(f"{folder}: cannot be used: {problem.strerror or problem}") from problem


def _strangers(folder: Path, entries: list[Path]) -> list[Path]:
    """List what in `folder`, be it one run or a folder of runs, is not our output."""
    if _is_run(folder):
        return [path for path in entries if not (_is_record_file(path) or _is_page(path))]
    strangers = []
    for path in entries:
        if _is_run(path):
            strangers += [child for child in sorted(path.iterdir()) if not (_is_record_file(child) or _is_page(child))]
        elif path.name == INSTANCES_PARTIAL and path.is_dir() and not path.is_symlink():
            strangers += [stranger for of in sorted(path.iterdir()) for stranger in _strangers_below(of)]
        elif not (_is_page(path) or _is_leftover(path) or _is_recorded_trace(path)):
            strangers.append(path)
    return strangers


def _strangers_below(path: Path) -> list[Path]:
    return [path] if path.is_symlink() or not path.is_dir() else _strangers(path, sorted(path.iterdir()))


def _is_run(folder: Path) -> bool:
    """A folder whose meta.json says that it is ours. A link is never: what it points at lives elsewhere."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return read_json(folder / META_FILE).get("format") == FORMAT
    except InputError:
        return False


def _is_record_file(path: Path) -> bool:
    return path.name in RECORD_FILES and path.is_file()


def _is_page(path: Path) -> bool:
    if path.name != PAGE_FILE or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return PAGE_MARK in file.read(1024)


def _is_leftover(path: Path) -> bool:
    if not (path.name.startswith(".") and path.name.endswith(PARTIAL) and path.is_dir() and not path.is_symlink()):
        return False
    return all(_is_record_file(child) for child in path.iterdir())


def _is_recorded_trace(path: Path) -> bool:
    """The trace beside the run of a server, or what a server that died had written of it."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.name == TRACE_PARTIAL or (path.name == TRACE_FILE and any(_is_run(p) for p in path.parent.iterdir()))
