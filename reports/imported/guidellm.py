"""Reports of guidellm, JSON or YAML: ``benchmarks``, each with its requests by how they ended.

Up to version 0.3 a request has its times itself, later in ``info.timings``. They are seconds since 1970.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from reports.imported.client_run import ClientRow, ClientRun, closed_loop, counted, failed
from reports.imported.engine_settings import settings_of
from reports.imported.place import Place
from reports.record.schema import FINISHED, UNFINISHED

GUIDELLM = "guidellm"
GROUPS = ("successful", "errored", "incomplete")
EARLIER = ("start_time", "first_token_time", "last_token_time", "end_time")
LATER = ("request_start", "first_token_iteration", "last_token_iteration", "request_end")
"""What the moments of a request are called."""


def is_report(values: Mapping[str, Any]) -> bool:
    """Tell whether an object is a report."""
    return isinstance(values.get("benchmarks"), list)


def describe(benchmark: Place) -> str:
    """The load of a benchmark, to tell it from others in the report."""
    return ", ".join(f"{name} {value}" for name, value in _load(benchmark).items())


def read_run(benchmark: Place, report: Place) -> ClientRun:
    """Read one benchmark of a report. Raises RecordError, with the field, for what is missing or no number."""
    requests = benchmark.get("requests")
    if not isinstance(requests, dict) or not any(requests.get(group) for group in GROUPS):
        raise benchmark.error(
            "requests",
            "missing: holds aggregates only; guidellm writes every request into its JSON and YAML (CSV, HTML and the "
            "console have none), unless --output-sampling or --sample-requests is 0",
        )
    groups = benchmark.inner("requests")
    rows: list[ClientRow] = []
    notes: list[str] = []
    never_sent = 0
    for group in GROUPS:
        for request in groups.objects(group) if groups.get(group) is not None else []:
            row = _row(request, group, len(rows) + 1)
            if row is None:
                never_sent += 1
            else:
                rows.append(row)
    if never_sent:
        notes.append(f"{counted(never_sent, 'request')} not yet sent when the benchmark stopped, left out")
    total = _total(benchmark)
    if total is not None and total > len(rows) + never_sent:
        notes.append(f"the report holds {len(rows)} of {total} requests, a sample: throughput is of these alone")
    turns = Counter(row.session_id for row in rows)
    for row in rows:
        if turns[row.session_id] == 1:
            row.session_id, row.turn = "", math.nan
    load = _load(benchmark)
    settings = settings_of({})
    if load.get("strategy") in ("concurrent", "synchronous"):
        settings |= closed_loop(load.get("streams", 1))
    version = report.inner_or_empty("metadata").text("guidellm_version")
    return ClientRun(
        path=benchmark.path,
        tool=GUIDELLM,
        rows=rows,
        gaps_s=np.empty(0),
        model=_model(benchmark, report),
        settings=settings,
        arguments={**({"version": version} if version else {}), **load},
        notes=notes,
    )


def _row(request: Place, group: str, number: int) -> ClientRow | None:
    """One request; None where it was never sent."""
    info = request.inner_or_empty("info")
    times, names = (info.inner("timings"), LATER) if info.get("timings") is not None else (request, EARLIER)
    sent_s, first_s, last_s, end_s = (_moment(times, name) for name in names)
    finished = group == "successful"
    if math.isnan(sent_s):
        if finished:
            raise times.error(names[0], "missing")
        return None
    finish_s = end_s if math.isnan(last_s) else last_s
    if finished and math.isnan(finish_s):
        raise times.error(names[-1], "missing")
    in_order = [moment for moment in (sent_s, first_s, finish_s) if not math.isnan(moment)]
    if in_order != sorted(in_order):
        raise times.error(names[1], f"the moments {', '.join(names)} are not in this order")
    error = request.text("error") or info.text("error") or ""
    status = FINISHED if finished else UNFINISHED if group == "incomplete" else failed(error, first_s)
    return ClientRow(
        request_id=request.text("request_id") or f"r{number}",
        sent_s=sent_s,
        first_token_s=first_s,
        finish_s=math.nan if status == UNFINISHED else finish_s,
        input_tokens=_tokens(request, "prompt_tokens", finished),
        output_tokens=_tokens(request, "output_tokens", finished),
        status=status,
        error=error,
        cached_tokens=_tokens(request, "cached_tokens", False),
        session_id=info.text("conversation_id") or "",
        turn=info.number_or_nan("turn_index"),
    )


def _moment(times: Place, name: str) -> float:
    """A moment, NaN where it did not happen: then there is nothing, or -1."""
    return math.nan if times.get(name) == -1 else times.number_or_nan(name)


def _tokens(request: Place, name: str, needed: bool) -> int:
    return request.whole(name) if needed or request.get(name) is not None else 0


def _total(benchmark: Place) -> int | None:
    """Requests that the benchmark made, as it counts them itself."""
    for place in (benchmark, benchmark.inner_or_empty("metrics")):
        total = place.inner_or_empty("request_totals").get("total")
        if isinstance(total, int):
            return total
    return None


def _load(benchmark: Place) -> dict[str, Any]:
    """The strategy of a benchmark: how many at a time, or how many a second."""
    config = benchmark.inner_or_empty("config" if benchmark.get("config") else "args")
    strategy = config.inner_or_empty("strategy")
    load = {"strategy": strategy.get("type_")}
    for name in ("streams", "max_concurrency", "rate", "initial_burst"):
        load[name] = strategy.get(name)
    if load["streams"] is not None:
        del load["max_concurrency"]
    return {name: value for name, value in load.items() if value is not None}


def _model(benchmark: Place, report: Place) -> str | None:
    backend = benchmark.inner_or_empty("config").inner_or_empty("backend")
    return (
        backend.text("model")
        or report.inner_or_empty("args").text("model")
        or benchmark.inner_or_empty("worker").text("backend_model")
        or benchmark.inner_or_empty("benchmarker").inner_or_empty("backend").text("model")
    )
