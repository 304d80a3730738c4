"""Runs of LLMServingSim's benchmarks: a folder in whose files the engine itself tells when what happened.

It holds ``requests.jsonl`` (one request a line, with the engine's own clock: ``queued_ts``, ``scheduled_ts``,
``first_token_ts``, ``last_token_ts``, in seconds, and the client's ``arrival_time`` on another clock) and ``meta.json``
(``model``, ``engine_kwargs``, versions). A ``config.json`` beside them is the cluster that the publisher's simulator was
given; its link between GPUs (``link_bw`` in GB/s, ``link_latency`` in ns) is kept.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ground.json_file import read_json, read_json_lines
from ground.link import written_rate, written_time
from reports.imported.engine_settings import VLLM_PRESET, settings_of
from reports.imported.place import LARGEST, Place
from reports.record.errors import RecordError
from reports.record.meta import HardwareMeta, RunMeta, Totals, TraceMeta
from reports.record.run_record import RunRecord, no_rows
from reports.record.schema import FINISHED, ITERATION_COLUMNS

FILES = ("requests.jsonl", "meta.json")
"""What makes a folder one of these."""
CLUSTER = "config.json"
TIMES = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
TOKENS = ("input_toks", "output_toks")
MAYBE = ("arrival_time", "instance")
"""Need not be there."""
CLOCKED = (*TIMES, "arrival_time")
COUNTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "block_size",
    "num_gpu_blocks_override",
)
"""Arguments of the engine that are multiplied by each other."""


def read_measured(folder: Path, name: str | None = None, command: str = "") -> RunRecord:
    """The run in ``folder`` as a record. Its clock starts when the first request was queued.

    ``meta["latency_from"]`` is ``queued``: the client's clock is another one, so latencies count from the moment at
    which the engine queued a request. ``arrival_s`` is the client's time brought to the engine's clock by assuming that
    the quickest request took no time to get there; where the client's time is missing it is the engine's, and a note of
    the record says so.

    Raises RecordError with file, line and field.
    """
    _check_folder(folder)
    meta = read_json(folder / "meta.json", RecordError)
    rows = _rows(folder / "requests.jsonl")
    queued, scheduled, first, last = (np.array([row[key] for row in rows], np.float64) for key in TIMES)
    start = queued.min()
    arrival, notes = _arrivals(rows, queued)
    whole = np.zeros(len(rows), np.int64)
    version = meta.get("vllm_version")
    kwargs = _engine_arguments(Place(folder / "meta.json", "", meta))
    settings = {**settings_of(kwargs, version), **_kv_cache(meta)}
    if version and not f"vllm-{version}.".startswith(f"{VLLM_PRESET}."):
        notes.append(
            f"measured under vLLM {version}: engine {VLLM_PRESET} stands for it, unless --engine names another"
        )
    gpus = math.prod(_whole(settings.get(name)) for name in ("tp", "pp", "dp"))
    described = RunMeta(
        kind="imported",
        name=name or folder.name,
        command=command,
        latency_from="queued",
        trace=TraceMeta(
            str(meta.get("dataset_path", "unknown")), "llmservingsim", str(meta.get("dataset_hash", "")), notes
        ),
        model=str(meta.get("model", "unknown")),
        hardware=HardwareMeta(str(meta.get("hardware", "unknown")), gpus, simulated=False),
        settings={**settings, **(_link(folder / CLUSTER) if gpus > 1 else {}), "engine_kwargs": kwargs},
        versions={"vllm": version} if version else {},
        totals=Totals(requests=len(rows), ended=len(rows), iterations=0),
        interrupted=False,
    )
    columns: dict[str, Any] = {
        "request_id": [str(row.get("request_id", f"r{i + 1}")) for i, row in enumerate(rows)],
        "session_id": [""] * len(rows),
        "instance": np.array([int(row.get("instance") or 0) for row in rows], np.int64),
        "arrival_s": arrival - start,
        "queued_s": queued - start,
        "scheduled_s": scheduled - start,
        "first_token_s": first - start,
        "finish_s": last - start,
        "input_tokens": np.array([row["input_toks"] for row in rows], np.int64),
        "output_tokens": np.array([row["output_toks"] for row in rows], np.int64),
        "cached_tokens": whole,
        "retractions": whole,
        "status": [FINISHED] * len(rows),
    }
    no_gaps = np.empty(0), np.empty(0, np.int64)
    return RunRecord(described.to_json(), columns, no_rows(ITERATION_COLUMNS), no_gaps)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise RecordError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise RecordError(f"{folder}: is a file; give the folder of a run, which holds {' and '.join(FILES)}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        kind = "a run record already" if (folder / "requests.csv").is_file() else "not the folder of a measured run"
        raise RecordError(
            f"{folder}: is {kind}: it has no {' and no '.join(missing)}, as LLMServingSim's benchmarks leave them"
        )


def _engine_arguments(meta: Place) -> dict[str, Any]:
    """What the engine was started with. Raises RecordError where that is no object, or a number to reckon with is none."""
    if meta.get("engine_kwargs") is None:
        return {}
    kwargs = meta.inner("engine_kwargs")
    for field in COUNTS:
        if kwargs.get(field) is not None:
            kwargs.whole(field)
    return dict(kwargs.values)


def _arrivals(rows: list[dict[str, Any]], queued: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Arrivals on the engine's clock, and what there is to say of them: on two clocks, one row apart from the rest would
    be out of place, so all rows have the client's time or none has."""
    unknown = [number for number, row in enumerate(rows, 1) if row.get("arrival_time") is None]
    if not unknown:
        arrival = np.array([row["arrival_time"] for row in rows], np.float64)
        return arrival + (queued - arrival).min(), []
    which = "all" if len(unknown) == len(rows) else f"{len(unknown)} of {len(rows)}"
    return queued, [
        f"{which} requests have no arrival_time (the first is number {unknown[0]} in requests.jsonl): every request "
        "arrives when the engine queued it, and what passed before that is not in the record"
    ]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 1


def _kv_cache(meta: dict[str, Any]) -> dict[str, Any]:
    """The KV pool the engine found, where the run recorded it."""
    facts = meta.get("kv_cache")
    if not isinstance(facts, dict):
        return {}
    found = {}
    blocks, size = facts.get("num_gpu_blocks"), facts.get("block_size")
    if isinstance(size, int) and size > 0:
        found["page_size"] = size
        if isinstance(blocks, int) and blocks > 0:
            found["kv_tokens"] = blocks * size
    return found


def _link(path: Path) -> dict[str, str]:
    """The link between the GPUs of a run, as settings say it; nothing where no file tells. Raises RecordError."""
    if not path.is_file():
        return {}
    values = read_json(path, RecordError)
    found = {}
    for field, name, written in (
        ("link_bw", "link", lambda value: written_rate(value * 1e9)),
        ("link_latency", "link_latency", lambda value: written_time(value / 1e9)),
    ):
        value = values.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise RecordError(f"{path}: {field}: {value!r} is not a number above 0")
        found[name] = written(value)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines: dict[str, int] = {}
    for number, row in read_json_lines(path, RecordError):
        for field in (*TIMES, *TOKENS, *MAYBE):
            value = row.get(field)
            if value is None and field in MAYBE:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                problem = "missing" if value is None else f"{value!r} is not a number of 0 or more"
                raise RecordError(f"{path}: line {number}: {field}: {problem}")
            if value > LARGEST:
                raise RecordError(f"{path}: line {number}: {field}: larger than {LARGEST:g}")
            if field not in CLOCKED and value != int(value):
                raise RecordError(f"{path}: line {number}: {field}: {value!r} is not a whole number")
        if not row["queued_ts"] <= row["first_token_ts"] <= row["last_token_ts"]:
            raise RecordError(f"{path}: line {number}: first_token_ts: not between queued_ts and last_token_ts")
        request_id = row.get("request_id")
        if request_id is not None and lines.setdefault(str(request_id), number) != number:
            raise RecordError(
                f"{path}: line {number}: request_id: {request_id!r} is on line {lines[str(request_id)]}, too"
            )
        rows.append(row)
    if not rows:
        raise RecordError(f"{path}: no request")
    return rows
