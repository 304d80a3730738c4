"""Runs whose clock begins when their first request arrives, as a page shows them."""

from __future__ import annotations

import numpy as np

from reports.record.run_record import RunRecord
from reports.record.schema import REQUEST_COLUMNS, Kind

_DURATIONS = ("slo_ttft_s", "slo_tpot_s")
_REQUEST_MOMENTS = [name for name, kind in REQUEST_COLUMNS.items() if kind is Kind.TIME and name not in _DURATIONS]
_ITERATION_MOMENTS = ("launch_s", "start_s", "end_s")


def first_arrival_s(record: RunRecord) -> float:
    """Find when the first request of a run arrived, on its own clock: that of a server has run for a while by then."""
    return float(np.min(record.requests["arrival_s"], initial=np.inf)) if len(record.requests["arrival_s"]) else 0.0


def from_first_arrival(record: RunRecord) -> RunRecord:
    """Count the moments of a record from its first arrival; returns the record itself where they are."""
    first_s = first_arrival_s(record)
    if not first_s:
        return record
    requests = {**record.requests, **{name: record.requests[name] - first_s for name in _REQUEST_MOMENTS}}
    iterations = {**record.iterations, **{name: record.iterations[name] - first_s for name in _ITERATION_MOMENTS}}
    meta = dict(record.meta)
    if isinstance(meta.get("fleet"), list | tuple):
        moments = ("begin_s", "end_s")
        meta["fleet"] = [{**span, **{name: span[name] - first_s for name in moments}} for span in meta["fleet"]]
    return RunRecord(meta, requests, iterations, record.itl, record.events)
