"""Fitting cost models to run records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.cost.models.fitted import Fit, fit_steps
from backends.simulated.cost.tables.fitted_file import read_fitted, write_fitted
from backends.simulated.host_fit import fit_host
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord


def fit_record(record: RunRecord, source: Path, out: Path) -> dict[str, Any]:
    """Fit a record's steps and CPU phases, write them to ``out``, and return what was written.

    Raises RecordError for a record without enough iterations.
    """
    fits = fit_stages(record, source)
    host, errors = fit_host(*host_columns(record.iterations, record.requests))
    settings = record.meta.get("settings") or {}
    gpu = record.meta.get("hardware") or {}
    write_fitted(
        out,
        fits,
        host,
        model=_name(record.meta.get("model")),
        gpu=str(gpu.get("gpu", "unknown")),
        dtype=str(settings.get("dtype", "bf16")),
        tp=int(settings.get("tp") or 1),
        source=str(source),
        host_errors=errors,
    )
    return read_fitted(out)


def fit_stages(record: RunRecord, source: Path | str) -> list[Fit]:
    """Step times of each pipeline stage. Raises RecordError for too few iterations."""
    columns = record.iterations
    if len(pools := record.meta.get("pools") or ()) > 1:
        names = ", ".join(str(pool.get("name")) for pool in pools)
        raise RecordError(f"{source}: its pools ({names}) are of different instances, which no one fit describes")
    if not len(columns["stage"]):
        raise RecordError(f"{source}: has no iterations, so there are no step times to fit")
    fits = []
    for stage in range(int(columns["stage"].max()) + 1):
        of = columns["stage"] == stage
        seconds = (columns["end_s"] - columns["start_s"])[of]
        known = seconds > 0
        taken = {
            name: columns[name][of][known].astype(np.float64)
            for name in ("prefill_tokens", "decode_tokens", "context_tokens", "requests")
        }
        try:
            fits.append(
                fit_steps(
                    taken["prefill_tokens"],
                    taken["decode_tokens"],
                    taken["context_tokens"],
                    taken["requests"] - taken["decode_tokens"],
                    seconds[known],
                )
            )
        except ValueError as error:
            raise RecordError(f"{source}: iterations.csv, stage {stage}: {error}") from error
    return fits


def host_columns(
    iterations: Mapping[str, np.ndarray], requests: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the first stage's rows, requests that ended in each) of the columns of iterations.csv and requests.csv."""
    first = iterations["stage"] == 0
    columns = {name: values[first] for name, values in iterations.items()}
    ended = np.zeros(int(first.sum()))
    finish = requests["finish_s"]
    for instance in np.unique(columns["instance"]):
        rows = (columns["instance"] == instance).nonzero()[0]
        times = finish[(requests["instance"] == instance) & ~np.isnan(finish)]
        # The last iteration to end by the time a request is out is the one that gave its last token.
        place = np.searchsorted(columns["end_s"][rows], times, side="right") - 1
        np.add.at(ended, rows[place[place >= 0]], 1)
    return columns, ended


def _name(model: Any) -> str:
    return str(model.get("name", "unknown")) if isinstance(model, dict) else str(model)
