"""What each kind of instance did, in a run that had several."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import Any

import numpy as np

from reports.metrics.coming_and_going import fleet_numbers, fleet_spans
from reports.metrics.instances import Pool, pools_of
from reports.metrics.labels import UNKNOWN, Unit, written
from reports.metrics.percentiles import spread
from reports.metrics.summary import run_window
from reports.metrics.time_use import CAUSES, TimeUse, time_use
from reports.record.run_record import RunRecord
from reports.record.schema import FINISHED

COLUMNS = (
    ("instances", "Instances", Unit.COUNT),
    ("gpus", "GPUs", Unit.COUNT),
    ("requests", "Requests", Unit.COUNT),
    ("input_tokens", "Input tokens", Unit.COUNT),
    ("output_tokens", "Output tokens", Unit.COUNT),
    ("gpu_busy_share", "GPU busy", Unit.SHARE),
    ("idle_none_share", "No work", Unit.SHARE),
    ("idle_peer_share", "Other side", Unit.SHARE),
    ("ttft_mean_s", "TTFT mean", Unit.SECONDS),
    ("ttft_p99_s", "TTFT p99", Unit.SECONDS),
    ("tpot_mean_s", "TPOT mean", Unit.SECONDS),
    ("tpot_p99_s", "TPOT p99", Unit.SECONDS),
    ("gpu_hours", "GPU hours", Unit.AMOUNT),
    ("energy_kwh", "kWh", Unit.AMOUNT),
    ("cost", "Cost", Unit.AMOUNT),
)
"""What a table of pools shows: key, heading, unit."""


def pool_rows(record: RunRecord) -> list[dict[str, Any]]:
    """The rows of a table of a run's pools: name, GPU, loop, and a text for each of :data:`COLUMNS`; none for one pool."""
    numbers = pool_numbers(record)
    cells = [written([each.get(key) for each in numbers], unit) for key, _, unit in COLUMNS]
    return [
        {"name": each["name"], "gpu": each["gpu"], "loop": each["loop"], "cells": list(row)}
        for each, row in zip(numbers, zip(*cells, strict=True), strict=True)
    ]


def pool_table(records: Mapping[str, RunRecord]) -> tuple[list[str], dict[str, list[dict[str, Any]]]]:
    """The headings of one table of the pools of several runs, and the rows of each run that has pools. A column of which
    nothing is known anywhere is left out."""
    rows = {name: found for name, record in records.items() if (found := pool_rows(record))}
    known = [any(row["cells"][i] != UNKNOWN for found in rows.values() for row in found) for i in range(len(COLUMNS))]
    for found in rows.values():
        for row in found:
            row["cells"] = list(compress(row["cells"], known))
    return list(compress((heading for _, heading, _ in COLUMNS), known)), rows


def pool_lines(name: str, record: RunRecord) -> list[str]:
    """A sentence about each pool of a run with several."""
    lines = []
    for row, each in zip(pool_rows(record), pool_numbers(record), strict=True):
        cells = dict(zip((key for key, _, _ in COLUMNS), row["cells"], strict=True))
        prefills = each["role"] == "prefill"
        wrote = f"{cells['input_tokens']} input tokens" if prefills else f"{cells['output_tokens']} output tokens"
        idle = [
            f"{what} {cells[key]}"
            for key, what in (("idle_none_share", "no work"), ("idle_peer_share", "for the other side"))
            if each["role"] != "both" and each[key]
        ]
        if "instances_mean" in each:
            few, most = each["instances_least"], each["instances_most"]
            idle += [f"{few} to {most} instances, {each['instances_mean']:.2f} on average"]
            idle += [f"{each[what]} {what}" for what in ("started", "lost") if each[what]]
        idle += [f"{cells['gpu_hours']} GPU hours"] * (each.get("gpu_hours") is not None)
        idle += [f"{cells['energy_kwh']} kWh"] * (each.get("energy_kwh") is not None)
        idle += [f"cost {cells['cost']}"] * (each.get("cost") is not None)
        latency = [f"TTFT mean {cells['ttft_mean_s']}"] * (each["role"] != "decode")
        latency += [f"TPOT mean {cells['tpot_mean_s']}"] * (not prefills)
        lines.append(
            f"{name}, pool {row['name']}: {cells['instances']} x {each['gpus'] // each['instances']} {row['gpu']}, "
            + ", ".join(
                [f"{cells['requests']} requests", wrote, f"GPU busy {cells['gpu_busy_share']}", *idle, *latency]
            )
        )
    return lines


def pool_numbers(record: RunRecord) -> list[dict[str, Any]]:
    """What each pool of a run with several did: requests and tokens it was sent and wrote, how its GPUs spent their time,
    and the latencies of its finished requests in seconds (None where nothing finished). Of a shared request both sides
    have the prompt and the TTFT, and the one that decodes the rest."""
    pools = pools_of(record)
    if len(pools) < 2 and fleet_spans(record) is None:
        return []
    return [_numbers(record, pool) for pool in pools]


def _numbers(record: RunRecord, pool: Pool) -> dict[str, Any]:
    column = record.requests
    where = column["prefill_instance"] if pool.role == "prefill" else column["instance"]
    here = (where >= pool.first) & (where < pool.first + pool.count)
    done = here & np.array([status == FINISHED for status in column["status"]], bool)
    ttft_s = (column["first_token_s"] - column["arrival_s"])[done]
    gaps = column["output_tokens"][done] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot_s = np.where(gaps > 0, (column["finish_s"] - column["first_token_s"])[done] / gaps, np.nan)
    use = time_use(record, pool.numbers)
    decodes = pool.role != "prefill"
    return {
        "name": pool.name,
        "role": pool.role,
        "instances": pool.count,
        "gpu": pool.gpu,
        "gpus": pool.gpus,
        "loop": pool.loop,
        "requests": int(here.sum()),
        "finished": int(done.sum()),
        "input_tokens": int(column["input_tokens"][done].sum()),
        "output_tokens": int(column["output_tokens"][done].sum()) if decodes else None,
        **_shares(use),
        **(fleet_numbers(record, pool, window.begin_s, window.end_s) if (window := run_window(record)) else {}),
        **spread("ttft", ttft_s),
        **(spread("tpot", tpot_s) if decodes else spread("tpot", np.empty(0))),
    }


def _shares(use: TimeUse | None) -> dict[str, float | None]:
    """The share of the pool's GPU time in which it computed, and of each cause of idling."""
    names = [f"idle_{cause}_share" for cause in CAUSES]
    if use is None:
        return dict.fromkeys(["gpu_busy_share", *names])
    idle = {f"idle_{cause}_share": seconds / use.gpu_s for cause, seconds in use.idle_s.items()}
    return {"gpu_busy_share": sum(use.busy_s.values()) / use.gpu_s, **idle}
