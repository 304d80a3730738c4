"""The run record: what every run leaves behind, whoever made it, and how it is written and read.

A record is a few files in one folder: meta.json, requests.csv, iterations.csv, itl.csv and, where it is known which request
was computed in which batch, events.csv (docs/run-record.md).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ground.json_file import json_text, read_json
from ground.whole_file import partial_path
from reports.record.csv_text import read_columns, write_columns
from reports.record.errors import RecordError
from reports.record.iteration_log import IterationLog
from reports.record.meta import kind_of, upgraded
from reports.record.out_folder import prepare_out
from reports.record.schema import (
    DECISIONS_FILE,
    EVENT_COLUMNS,
    EVENTS_FILE,
    FORMAT,
    FORMAT_VERSION,
    HANDOVER_COLUMNS,
    ITERATION_COLUMNS,
    ITERATIONS_FILE,
    ITL_COLUMNS,
    ITL_FILE,
    META_FILE,
    OPTIONAL_REQUEST_COLUMNS,
    REQUEST_COLUMNS,
    REQUESTS_FILE,
    Kind,
)

__all__ = ["IterationLog", "RecordError", "RunRecord", "prepare_out", "read_record", "write_record"]

_DECIMALS = 9  # nanoseconds


@dataclass
class RunRecord:
    """One run in memory.

    On construction the columns are brought into the form in which they are written: all there, in order, with their
    dtypes, times rounded to nanoseconds, equal gaps of `itl` merged. So numbers computed from a record before it is
    written and after it is read back are the same numbers.

    `meta` is what meta.json holds, as `meta.RunMeta.to_json()` lays it out; the metrics read `dp` and `pp` of its settings.
    `requests` and `iterations` hold the columns of `schema.REQUEST_COLUMNS` and `schema.ITERATION_COLUMNS`;
    `itl` the inter-token gaps as (itl_s, count); `events` the columns of `schema.EVENT_COLUMNS`, no rows if unknown.

    Raises `RecordError` for a missing, unknown or misshapen column.
    """

    meta: dict[str, Any]
    requests: dict[str, Any]
    iterations: dict[str, np.ndarray]
    itl: tuple[np.ndarray, np.ndarray]
    events: dict[str, Any] = field(default_factory=lambda: no_rows(EVENT_COLUMNS))
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Results of costly functions of the columns, by (function, arguments), for whoever asks next."""

    def __post_init__(self) -> None:
        self.requests = _in_form(self.requests, REQUEST_COLUMNS, "requests", OPTIONAL_REQUEST_COLUMNS)
        self.iterations = _in_form(self.iterations, ITERATION_COLUMNS, "iterations")
        self.events = _in_form(self.events, EVENT_COLUMNS, "events")
        gaps = _in_form(dict(zip(ITL_COLUMNS, self.itl, strict=True)), ITL_COLUMNS, "itl")
        itl_s, place = np.unique(gaps["itl_s"], return_inverse=True)
        count = np.bincount(place, weights=gaps["count"], minlength=len(itl_s)).astype(np.int64)
        self.itl = (itl_s, count)

    @property
    def name(self) -> str:
        """Name of the run in tables and charts."""
        return str(self.meta.get("name", "run"))


def no_rows(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The columns of a table of which nothing is known, such as the iterations of a run that clients saw."""
    return {name: np.zeros(0, dtype=np.int64) for name in kinds}


def _in_form(
    columns: Mapping[str, Any], kinds: Mapping[str, Kind], table: str, optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    unknown = [name for name in columns if name not in kinds]
    missing = [name for name in kinds if name not in columns and name not in optional]
    if unknown or missing:
        raise RecordError(
            f"{table}: "
            + "; ".join(
                f"{what} column {', '.join(names)}"
                for what, names in (("unknown", unknown), ("missing", missing))
                if names
            )
        )
    rows = len(columns[next(iter(kinds))])
    formed: dict[str, Any] = {}
    for name, kind in kinds.items():
        values = columns.get(name)
        if values is None:
            values = np.full(rows, np.nan)
        if len(values) != rows:
            raise RecordError(f"{table}: column {name} has {len(values)} rows, the first column has {rows}")
        formed[name] = _formed(values, kind, f"{table}: column {name}")
    return formed


def _formed(values: Any, kind: Kind, where: str) -> Any:
    if kind is Kind.TEXT:
        return ["" if value is None else str(value) for value in values]
    if kind in (Kind.TIME, Kind.NUMBER):
        numbers = np.asarray(values, dtype=np.float64)  # None becomes NaN
        if kind is not Kind.TIME:
            return numbers
        rounded = np.round(numbers, _DECIMALS)
        rounded += 0.0  # no minus zero
        return rounded
    whole = np.asarray(values)
    dtype = np.int8 if kind is Kind.MODE else np.int64
    if len(whole) and whole.dtype.kind not in "iub":
        raise RecordError(f"{where}: whole numbers wanted, not {whole.dtype}")
    return whole.astype(dtype, copy=False)


def write_record(record: RunRecord, folder: str | Path, extra_files: Mapping[str, Path] | None = None) -> None:
    """Write `record` as the folder `folder`, all of it or nothing.

    The files are made in a hidden folder beside it, which is then renamed. The bytes depend on the record alone.
    `extra_files` names finished files to move in, e.g. {"decisions.jsonl": path}.

    Raises `RecordError` if the folder exists and is not empty (see `prepare_out`), cannot be written, or `meta` is not
    JSON.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordError(f"{folder}: exists and is not an empty folder")
    for name in extra_files or {}:
        if name != DECISIONS_FILE:
            raise RecordError(f"{folder}: a run record holds no {name}")
    meta = _meta_bytes(record.meta, folder)
    partial = partial_path(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / META_FILE).write_bytes(meta)
        itl = dict(zip(ITL_COLUMNS, record.itl, strict=True))
        requests = _written(record.requests)
        _write(partial / REQUESTS_FILE, lambda file: write_columns(requests, REQUEST_COLUMNS, file))
        if len(record.iterations["iteration"]) or kind_of(record.meta) not in ("observed", "imported"):
            _write(partial / ITERATIONS_FILE, lambda file: write_columns(record.iterations, ITERATION_COLUMNS, file))
        _write(partial / ITL_FILE, lambda file: write_columns(itl, ITL_COLUMNS, file))
        if record.events["request_id"]:
            _write(partial / EVENTS_FILE, lambda file: write_columns(record.events, EVENT_COLUMNS, file))
        for name, source in (extra_files or {}).items():
            shutil.move(source, partial / name)
        os.replace(partial, folder)
    except OSError as problem:
        raise RecordError(f"{folder}: cannot be written: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _written(requests: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of requests, without those about handovers where there were none."""
    if np.isfinite(requests["decode_instance"]).any():
        return dict(requests)
    return {name: values for name, values in requests.items() if name not in HANDOVER_COLUMNS}


def _write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    with path.open("wb") as file:
        fill(file)


def _meta_bytes(meta: Mapping[str, Any], folder: Path) -> bytes:
    marked = {**meta, "format": FORMAT, "format_version": FORMAT_VERSION}
    try:
        text = json_text(marked, sort_keys=True, strict=True)
    except (TypeError, ValueError) as problem:
        raise RecordError(f"{folder}: {META_FILE} cannot hold these settings: {problem}") from problem
    return (text + "\n").encode()


def read_record(folder: str | Path) -> RunRecord:
    """Read the run in `folder`. Of its files only meta.json and requests.csv have to be there: a load test of somebody
    else's server knows no iterations, an imported run maybe no gaps between tokens.

    Raises `RecordError`, with file, line and column where there is one, for a folder that is no run, a file that does
    not parse, a missing column, or a run without a single request.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    requests = read_columns(folder / REQUESTS_FILE, REQUEST_COLUMNS, OPTIONAL_REQUEST_COLUMNS)
    if not requests["request_id"]:
        raise RecordError(f"{folder / REQUESTS_FILE}: an empty run: it holds no request")
    iterations = _read_if_there(folder / ITERATIONS_FILE, ITERATION_COLUMNS)
    itl = _read_if_there(folder / ITL_FILE, ITL_COLUMNS)
    events = _read_if_there(folder / EVENTS_FILE, EVENT_COLUMNS)
    return RunRecord(meta, requests, iterations, (itl["itl_s"], itl["count"]), events)


def _read_if_there(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    return read_columns(path, kinds) if path.exists() else no_rows(kinds)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The meta.json of the run in `folder`, in the words of this version (`meta.RunMeta`), without the marks of its format.

    Raises `RecordError` for a folder that is no run of ours.
    """
    folder = Path(folder)
    path = folder / META_FILE
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder")
    if not path.is_file():
        raise RecordError(f"{folder}: not a run: it holds no {META_FILE}{_hint(folder)}")
    meta = read_json(path, RecordError)
    if meta.pop("format", None) != FORMAT:
        raise RecordError(f"{path}: not the description of a workbench run")
    version = meta.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise RecordError(f"{path}: format version {version}, this workbench reads {FORMAT_VERSION}")
    return upgraded(meta)


def _hint(folder: Path) -> str:
    runs: Sequence[str] = sorted(path.parent.name for path in folder.glob(f"*/{META_FILE}"))
    return f" (its folders {', '.join(runs)} do)" if runs else ""
