"""Running a golden command and telling whether what it leaves is what was kept of it."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from tests.golden.cases import Case
from tests.golden.cli import workbench

DECISIONS = "decisions.jsonl"
EXACT = "exact"
"""Column of a sweep's results that says whether it was run with --exact, so that it differs between the two."""
Entry = dict[str, Any]
"""Of golden.json: `command`, `csv` {file: {columns, rows, sha256}} and `decisions` {file: sha256}."""


def run_case(case: Case, folder: Path) -> tuple[Path, Path]:
    """Run a command in ``folder`` without and with --exact, and return both outputs.

    Without, decode steps that are decided beforehand are skipped; with it every step is taken. Both write decisions, but
    for a sweep, which has none.
    """
    plain, exact = folder / "out" / case.name, folder / "out" / f"{case.name}-exact"
    for out in (plain, exact):
        shutil.rmtree(out, ignore_errors=True)
        flags = ["--json", f"--out {out}"]
        if out is exact:
            flags.append("--exact")
        if not case.command.startswith("workbench sweep"):
            flags.append("--decisions")
        workbench(" ".join([case.command, *flags]), folder)
    return plain, exact


def entry_of(case: Case, plain: Path) -> Entry:
    """What golden.json keeps of a command's output."""
    tables = {}
    for file in _files(plain, "*.csv"):
        header, rows = _read(plain / file)
        header = [name for name in header if name != EXACT]
        tables[file] = {"columns": ",".join(header), "rows": len(rows), "sha256": _sha256(plain / file, header)}
    decisions = {file: _bytes_sha256(plain / file) for file in _files(plain, DECISIONS)}
    return {"command": case.command, "csv": tables, "decisions": decisions}


def differences(case: Case, entry: Entry, plain: Path, exact: Path) -> list[str]:
    """In what the outputs of a command differ from its entry, a line each. Files and columns that have come since are
    none."""
    found = []
    if case.command != entry["command"]:
        found.append(f"the command was: {entry['command']}")
    for kind, folder in (("", plain), (" with --exact", exact)):
        for file, kept in entry["csv"].items():
            if what := _difference(folder / file, kept):
                found.append(f"{file}{kind}: {what}")
        for file, sha256 in entry["decisions"].items():
            if not (folder / file).exists():
                found.append(f"{file}{kind}: is gone")
            elif _bytes_sha256(folder / file) != sha256:
                found.append(f"{file}{kind}: other decisions")
    return found


def unshown(case: Case, plain: Path) -> list[str]:
    """What was to happen in a command and did not."""
    missing = []
    for name, query in case.shows:
        files = [pd.read_csv(plain / file) for file in _files(plain, name)]
        if not any(len(frame.query(query)) for frame in files):
            missing.append(f"{name}: no row with {query}")
    return missing


def _difference(path: Path, kept: dict[str, Any]) -> str:
    if not path.exists():
        return "is gone"
    header, rows = _read(path)
    columns = kept["columns"].split(",")
    if gone := [name for name in columns if name not in header]:
        return f"has no column {', '.join(gone)}"
    if len(rows) != kept["rows"]:
        return f"{len(rows)} rows instead of {kept['rows']}"
    return "" if _sha256(path, columns) == kept["sha256"] else "other values"


def _files(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    return header, rows


def _sha256(path: Path, columns: list[str]) -> str:
    """Of the table as CSV with exactly these columns in this order."""
    header, rows = _read(path)
    places = [header.index(name) for name in columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # A record is on a grid of nanoseconds. A sweep's means are not, and their last digits may depend on how many numbers
    # a processor adds at once.
    write = _nine_digits if path.name == "results.csv" else str
    writer.writerows([write(row[place]) for place in places] for row in rows)
    return hashlib.sha256(text.getvalue().encode()).hexdigest()


def _nine_digits(text: str) -> str:
    try:
        return f"{float(text):.9g}" if "." in text or "e" in text else text
    except ValueError:
        return text


def _bytes_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
