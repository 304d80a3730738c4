"""What each kind of instance did, in a run that had several."""

from __future__ import annotations

from typing import Any

import numpy as np

from reports.metrics.instances import Pool, pools_of
from reports.metrics.intervals import length, union
from reports.metrics.labels import Unit, written
from reports.metrics.percentiles import spread
from reports.metrics.summary import run_window
from reports.record.run_record import RunRecord
from reports.record.schema import FINISHED

COLUMNS = (
    ("instances", "Instances", Unit.COUNT),
    ("gpus", "GPUs", Unit.COUNT),
    ("requests", "Requests", Unit.COUNT),
    ("input_tokens", "Input tokens", Unit.COUNT),
    ("output_tokens", "Output tokens", Unit.COUNT),
    ("gpu_busy_share", "GPU busy", Unit.SHARE),
    ("ttft_mean_s", "TTFT mean", Unit.SECONDS),
    ("ttft_p99_s", "TTFT p99", Unit.SECONDS),
    ("tpot_mean_s", "TPOT mean", Unit.SECONDS),
    ("tpot_p99_s", "TPOT p99", Unit.SECONDS),
)
"""What a table of pools shows: key, heading, unit."""


def pool_rows(record: RunRecord) -> list[dict[str, Any]]:
    """The rows of a table of a run's pools: name, GPU, loop, and a text for each of :data:`COLUMNS`; none for one pool."""
    numbers = pool_numbers(record)
    cells = [written([each[key] for each in numbers], unit) for key, _, unit in COLUMNS]
    return [
        {"name": each["name"], "gpu": each["gpu"], "loop": each["loop"], "cells": list(row)}
        for each, row in zip(numbers, zip(*cells, strict=True), strict=True)
    ]


def pool_lines(name: str, record: RunRecord) -> list[str]:
    """A sentence about each pool of a run with several."""
    lines = []
    for row, each in zip(pool_rows(record), pool_numbers(record), strict=True):
        cells = dict(zip((key for key, _, _ in COLUMNS), row["cells"], strict=True))
        lines.append(
            f"{name}, pool {row['name']}: {cells['instances']} x {each['gpus'] // each['instances']} {row['gpu']}, "
            f"{cells['requests']} requests, {cells['output_tokens']} output tokens, GPU busy {cells['gpu_busy_share']}, "
            f"TTFT mean {cells['ttft_mean_s']}, TPOT mean {cells['tpot_mean_s']}"
        )
    return lines


def pool_numbers(record: RunRecord) -> list[dict[str, Any]]:
    """What each pool of a run with several did: requests and tokens it was sent and wrote, the share of the run in which its
    stages were busy, and the latencies of its finished requests in seconds (None where nothing finished)."""
    pools = pools_of(record)
    if len(pools) < 2:
        return []
    return [_numbers(record, pool) for pool in pools]


def _numbers(record: RunRecord, pool: Pool) -> dict[str, Any]:
    column = record.requests
    here = (column["instance"] >= pool.first) & (column["instance"] < pool.first + pool.count)
    done = here & np.array([status == FINISHED for status in column["status"]], bool)
    ttft_s = (column["first_token_s"] - column["arrival_s"])[done]
    written = column["output_tokens"][done] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot_s = np.where(written > 0, (column["finish_s"] - column["first_token_s"])[done] / written, np.nan)
    return {
        "name": pool.name,
        "instances": pool.count,
        "gpu": pool.gpu,
        "gpus": pool.gpus,
        "loop": pool.loop,
        "requests": int(here.sum()),
        "finished": int(done.sum()),
        "input_tokens": int(column["input_tokens"][done].sum()),
        "output_tokens": int(column["output_tokens"][done].sum()),
        "gpu_busy_share": _busy_share(record, pool),
        **spread("ttft", ttft_s),
        **spread("tpot", tpot_s),
    }


def _busy_share(record: RunRecord, pool: Pool) -> float | None:
    window, column = run_window(record), record.iterations
    if window is None:
        return None
    busy_s = 0.0
    for instance in range(pool.first, pool.first + pool.count):
        for stage in range(pool.stages):
            mine = (column["instance"] == instance) & (column["stage"] == stage)
            spans = (column[name][mine].clip(window.begin_s, window.end_s) for name in ("start_s", "end_s"))
            busy_s += length(union(*spans))
    return busy_s / (window.duration_s * pool.count * pool.stages)
