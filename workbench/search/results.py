"""A sweep's folder: what was asked (sweep.json) and what came out (results.csv).

results.csv is the journal as well as the result. Every finished point is one line, written in one go and synced, so
whatever kills the sweep costs at most a torn last line, which resuming removes.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_origin

from ground.errors import InputError
from ground.json_file import as_read_back, json_phrase, json_text, read_json
from ground.whole_file import PARTIAL, write_whole
from reports.metrics.sweep_metrics import SWEEP_METRICS
from reports.record.out_folder import PAGE_MARK
from workbench.search.point import STATUSES, Outcome
from workbench.search.space import Point
from workbench.settings.loading import SETTINGS
from workbench.settings.pool_keys import declared, split_name

FORMAT, FORMAT_VERSION = "workbench sweep", 1
LOCK_PATIENCE_S = 2.0
MANIFEST, RESULTS, PAGE, RECORDS = "sweep.json", "results.csv", "sweep.html", "records"


_BETWEEN = "; "
"""Between the values of a setting that is a list of them."""
_MAY_CHANGE = frozenset({"trace.path", "trace.name", "command"})
"""Parts of a manifest that say where things are, not what."""


class ResultsError(InputError):
    """A folder that cannot be used for a sweep, in one line."""


Row = dict[str, Any]
"""A line of results.csv: `point`, `status`, `reason`, all settings and all metrics. None where there is no value."""


def columns(varied: Sequence[str] = ()) -> list[str]:
    """List the columns of results.csv, in order; settings of pools that are ``varied`` have columns of their own."""
    return ["point", "status", "reason", *SETTINGS, *(name for name in varied if split_name(name)), *SWEEP_METRICS]


def key_of(point: Point) -> str:
    """Make the key that tells points apart."""
    return json_phrase(dict(sorted(point.items())))


class Results:
    """The open folder of a running sweep; a context manager.

    Raises ResultsError for a folder that holds something else, an earlier sweep unless `resume` or `force`, or another
    question than `manifest` asks.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], resume: bool = False, force: bool = False) -> None:
        self.folder = folder
        self._varied = [dimension["name"] for dimension in manifest["space"]]
        self.manifest = {**manifest, "format": FORMAT, "format_version": FORMAT_VERSION}
        going_on = _prepare(folder, resume, force)
        if going_on:
            _same_question(folder, self.manifest)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MANIFEST, json_text(self.manifest, sort_keys=True) + "\n", ResultsError)
        self._file = (folder / RESULTS).open("ab", buffering=0)
        if not _locked(self._file.fileno()):
            self._file.close()
            raise ResultsError(f"{folder}: another sweep is writing there")
        self.columns = columns(self._varied)
        self.rows = _kept(folder / RESULTS, self._file.fileno(), self.columns)
        if not os.fstat(self._file.fileno()).st_size:
            self._write([self.columns])

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def point_of(self, row: Row) -> Point:
        """The varied settings of a row."""
        return {name: row[name] for name in self._varied}

    def add(self, number: int, point: Point, outcome: Outcome) -> Row:
        """Keep what became of a point, for good."""
        row: Row = {**outcome.settings, **point, **outcome.metrics}
        row |= {"point": number, "status": outcome.status, "reason": outcome.reason}
        self._write([[_text(row.get(name)) for name in self.columns]])
        self.rows.append({name: row.get(name) for name in self.columns})
        return self.rows[-1]

    def sort(self) -> None:
        """Bring the file into the order of its points, now that all are there: the order in which they finished says
        nothing, and would make the same sweep two different files."""
        self.rows.sort(key=lambda row: row["point"])
        lines = _csv([self.columns, *([_text(row[name]) for name in self.columns] for row in self.rows)])
        write_whole(self.folder / RESULTS, lines, ResultsError)

    def _write(self, lines: Sequence[Sequence[str]]) -> None:
        os.write(self._file.fileno(), _csv(lines).encode())
        os.fsync(self._file.fileno())


def _locked(descriptor: int) -> bool:
    """Tell whether the lock was free, or became so soon: processes of a killed sweep hold it for the moment they live on."""
    until_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """(manifest, rows) of a sweep's folder, running or finished. Raises ResultsError if it holds none."""
    manifest = _manifest(folder)
    names = columns([dimension["name"] for dimension in manifest["space"]])
    return manifest, _parse(folder / RESULTS, (folder / RESULTS).read_bytes(), names)


def _prepare(folder: Path, resume: bool, force: bool) -> bool:
    """Tell whether there is a sweep to go on with; removes an earlier one with `force`."""
    if folder.exists() and not folder.is_dir():
        raise ResultsError(f"{folder}: exists and is not a folder")
    entries = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not entries:
        return False
    ours = {MANIFEST, RESULTS, PAGE, RECORDS}
    if MANIFEST not in entries:
        raise ResultsError(f"{folder}: exists and is not empty")
    _manifest(folder)
    if resume:
        return True
    if not force:
        raise ResultsError(f"{folder}: holds a sweep; --resume goes on with it, --force replaces it")
    page = folder / PAGE
    strangers = [name for name in entries if name not in ours and not _is_partial(name)]
    if page.exists() and PAGE_MARK not in page.read_bytes()[:1024]:
        strangers.append(PAGE)
    if strangers:
        raise ResultsError(f"{folder}: nothing removed: it holds {strangers[0]}, which no sweep wrote")
    for name in entries:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return False


def _is_partial(name: str) -> bool:
    """Tell what a killed sweep left of a file that it was writing; ``.partial-`` began the names of earlier versions'."""
    return name.startswith(".partial-") or (name.startswith(".") and name.endswith(PARTIAL))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path, ResultsError)
    if manifest.get("format") != FORMAT:
        raise ResultsError(f"{path}: not the description of a sweep")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ResultsError(f"{path}: format version {manifest.get('format_version')}, not {FORMAT_VERSION}")
    return manifest


def _same_question(folder: Path, asked: dict[str, Any]) -> None:
    before, now = _flat(_manifest(folder)), _flat(as_read_back(asked))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name) and name not in _MAY_CHANGE:
            raise ResultsError(
                f"{folder}: cannot be resumed: {name} was {_said(before.get(name))} and is {_said(now.get(name))}"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def _said(value: Any) -> str:
    text = "not set" if value is None else json_phrase(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _kept(path: Path, descriptor: int, names: list[str]) -> list[Row]:
    """The whole lines of the journal; what a kill left of another one is cut off."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = _parse(path, whole, names)
    if len(whole) < len(data):
        os.ftruncate(descriptor, len(whole))
    return rows


def _parse(path: Path, data: bytes, names: list[str]) -> list[Row]:
    lines = list(csv.reader(io.StringIO(data.decode(errors="replace"))))
    if not lines:
        return []
    if lines[0] != names:
        raise ResultsError(f"{path}: its columns are not those of this version")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(lines[0]) or line[1] not in STATUSES:
            raise ResultsError(f"{path}: line {number}: not a line of results")
        try:
            rows.append({name: _value(name, text) for name, text in zip(lines[0], line, strict=True)})
        except ValueError as error:
            raise ResultsError(f"{path}: line {number}: {error}") from None
    return rows


def _value(name: str, text: str) -> Any:
    if name == "point":
        return int(text)
    if name in ("status", "reason"):
        return text
    if not text:
        return None
    if name in SETTINGS and get_origin(SETTINGS[name].kind) is tuple:
        return SETTINGS[name].meant(text.split(_BETWEEN))
    if name in SETTINGS or split_name(name):
        return declared(name).parse(text)
    number = float(text)
    return int(text) if text.lstrip("-").isdigit() else number


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return _BETWEEN.join(map(str, value))
    return repr(value) if isinstance(value, float) else " ".join(str(value).split("\n"))


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
