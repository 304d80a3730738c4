"""Records of aiperf: ``profile_export.jsonl``, a request a line, and beside it what was asked for.

Moments are nanoseconds since 1970, metrics have their unit. ``profile_export_aiperf.json`` holds aggregates only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ground.errors import InputError
from ground.json_file import read_json
from reports.imported.client_run import ClientRow, ClientRun, closed_loop, counted, failed
from reports.imported.engine_settings import settings_of
from reports.imported.place import Place
from reports.record.errors import RecordError
from reports.record.schema import ABORTED, FINISHED

AIPERF = "aiperf"
RECORDS_FILE = "profile_export.jsonl"
SUMMARY_FILE = "profile_export_aiperf.json"
WITH_RECORDS = "aiperf writes what is per request into profile_export.jsonl with --export-level records"
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}


def is_record(values: Mapping[str, Any]) -> bool:
    """Tell whether an object is the record of one request."""
    metadata = values.get("metadata")
    return isinstance(metadata, dict) and "metrics" in values and "session_num" in metadata


def is_summary(values: Mapping[str, Any]) -> bool:
    """Tell whether an object is the summary of a run."""
    latency = values.get("request_latency")
    return "aiperf_version" in values or ("input_config" in values and isinstance(latency, dict) and "avg" in latency)


def records_beside(summary: Path) -> Path:
    """The records of the run that a summary is of, by the names that aiperf gives them. Raises RecordError."""
    prefix = summary.name.removesuffix(".json").removesuffix("_aiperf")
    records = summary.with_name(f"{prefix}.jsonl")
    if not records.is_file():
        raise RecordError(f"{summary}: holds aggregates only, and {records.name} is not beside it: {WITH_RECORDS}")
    return records


def read_run(path: Path, lines: Sequence[Place]) -> ClientRun:
    """Read the records of a run. Raises RecordError, with line and field, for what is missing or no number."""
    start_ns = min(line.inner("metadata").whole("request_start_ns") for line in lines)
    rows: list[ClientRow] = []
    gaps_s: list[np.ndarray] = []
    notes: list[str] = []
    warm = 0
    for line in lines:
        metadata = line.inner("metadata")
        if metadata.get("benchmark_phase") == "warmup":
            warm += 1
            continue
        rows.append(_row(line, metadata, start_ns, len(rows) + 1))
        gaps = line.inner("metrics").inner_or_empty("inter_chunk_latency")
        if isinstance(gaps.get("value"), list):
            gaps_s.append(gaps.numbers("value", gaps.get("value")) * _unit_s(gaps))
    if warm:
        notes.append(f"{counted(warm, 'request')} of the warm-up left out")
    if not any(row.turn > 0 for row in rows):
        for row in rows:
            row.session_id, row.turn = "", math.nan
    model, version, load = _asked_for(path, notes)
    settings = settings_of({})
    if set(load) == {"concurrency"}:
        settings |= closed_loop(load["concurrency"])
    return ClientRun(
        path=path,
        tool=AIPERF,
        rows=rows,
        gaps_s=np.concatenate([np.empty(0), *gaps_s]),
        model=model,
        settings=settings,
        arguments={**({"version": version} if version else {}), **load},
        notes=notes,
    )


def _row(line: Place, metadata: Place, start_ns: int, number: int) -> ClientRow:
    metrics = line.inner("metrics")
    # In whole nanoseconds: dates have no room for them in a float.
    sent_s = (metadata.whole("request_start_ns") - start_ns) / 1e9
    ttft_s, latency_s = (_seconds(metrics, name) for name in ("time_to_first_token", "request_latency"))
    cancelled = metadata.get("was_cancelled") is True
    lost = cancelled or line.get("error") is not None
    if not lost and math.isnan(latency_s):
        raise metrics.error("request_latency", "missing")
    if not lost and latency_s < ttft_s:
        raise metrics.error("request_latency", f"{latency_s:g} s is less than the time to the first token")
    error = line.inner_or_empty("error")
    code = error.get("code")
    status = f"{ABORTED}:cancelled" if cancelled else failed("", ttft_s, code if isinstance(code, int) else None)
    ended_s = (metadata.whole("request_end_ns") - start_ns) / 1e9 if lost else sent_s + latency_s
    return ClientRow(
        request_id=metadata.text("x_request_id") or f"r{number}",
        sent_s=sent_s,
        first_token_s=sent_s + ttft_s,
        finish_s=ended_s,
        input_tokens=_tokens(metrics, "input_sequence_length", not lost),
        output_tokens=_tokens(metrics, "output_sequence_length", not lost),
        status=status if lost else FINISHED,
        error="cancelled" if cancelled else error.text("message") or "",
        cached_tokens=_tokens(metrics, "usage_prompt_cache_read_tokens", False),
        session_id=metadata.text("x_correlation_id") or metadata.text("conversation_id") or "",
        turn=metadata.number_or_nan("turn_index"),
    )


def _seconds(metrics: Place, name: str) -> float:
    """A latency in seconds, NaN where there is none."""
    metric = metrics.inner_or_empty(name) if metrics.get(name) is None else metrics.inner(name)
    return math.nan if metric.get("value") is None else metric.number("value") * _unit_s(metric)


def _unit_s(metric: Place) -> float:
    unit = metric.text("unit")
    if unit is None or unit not in _UNITS_S:
        problem = "missing" if unit is None else f"{unit!r} is none"
        raise metric.error("unit", f"{problem}; there are {', '.join(_UNITS_S)}")
    return _UNITS_S[unit]


def _tokens(metrics: Place, name: str, needed: bool) -> int:
    if metrics.get(name) is None and not needed:
        return 0
    return metrics.inner(name).whole("value")


def _asked_for(records: Path, notes: list[str]) -> tuple[str | None, str | None, dict[str, Any]]:
    """Model, version and load of a run, from the summary beside its records; nothing where there is none.

    Adds to `notes` why there is nothing in one that cannot be read.
    """
    prefix = records.name.removesuffix(".jsonl")
    named = (records.with_name(name) for name in (f"{prefix}_aiperf.json", f"{prefix}.json"))
    found = next((path for path in named if path.is_file()), None)
    try:
        summary = Place(records, "", read_json(found) if found is not None else {})
    except InputError as problem:  # the records are whole without it
        notes.append(f"model, version and load of the run are not known: {problem}")
        return None, None, {}
    config = summary.inner_or_empty("input_config")
    model = next((item.text("name") for item in _listed(config.inner_or_empty("models"), "items")), None)
    names = config.inner_or_empty("endpoint").get("model_names")
    if model is None and isinstance(names, list) and names:
        model = str(names[0])
    loads = [config.inner_or_empty("loadgen"), *_listed(config, "phases")]
    load = {
        name: place.get(name)
        for place in loads
        if place.get("kind") != "warmup"
        for name in ("concurrency", "request_rate", "rate")
        if place.get(name) is not None
    }
    return model, summary.text("aiperf_version"), load


def _listed(place: Place, field: str) -> list[Place]:
    """The objects in the list of a field, none where there is no list."""
    values = place.get(field)
    listed = values if isinstance(values, list) else []
    return [Place(place.path, field, value) for value in listed if isinstance(value, dict)]
