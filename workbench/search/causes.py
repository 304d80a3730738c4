"""Causes of an exceeded latency, read from the record of the run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reports.metrics.handovers import STAGE_LABELS, first_tokens, is_shared
from reports.metrics.instances import capacity_of, pools_of, stages_each
from reports.metrics.labels import Unit, percent, written
from reports.record.run_record import RunRecord
from reports.record.schema import ABORTED, DECODE
from workbench.search.slo import Limit

DOMINANT = 0.5
"""A part that takes more than this share of the time is the cause."""
INTERFERENCE = 0.25
"""Share of the decoding time in which prefills ran, from which on they are the cause of slow decoding."""
FULL = 0.95
"""A pool or a running set is full from this share on."""


def explain(record: RunRecord, limit: Limit, idle: bool = False) -> str:
    """One sentence: what breaks and why. `idle` says that requests came one at a time, so that load is no reason.

    A run that was stopped early is judged by what there is of it.
    """
    column = record.requests
    lost = sorted({status for status in column["status"] if status.partition(":")[0] == ABORTED})
    if lost:
        number = sum(status in lost for status in column["status"])
        return (
            f"{limit.name}: {number:,} of {len(column['status']):,} requests end without an answer ({', '.join(lost)})"
        )
    if limit.latency in ("ttft", "queue", "e2e"):
        waiting = _waiting(record, limit)
        if idle or (waiting is not None and limit.latency != "e2e"):
            return waiting or f"{limit.name}: no request exceeds it"
        if waiting is not None and waiting.endswith(QUEUED):
            return waiting
    return _decoding(record, limit, idle)


QUEUED = "(queueing)"


def _waiting(record: RunRecord, limit: Limit) -> str | None:
    """Tell whether requests over the limit waited for their turn, or for their prompt to be computed."""
    column = record.requests
    now_s = float(np.nanmax([*record.iterations["end_s"], 0.0]))
    arrival_s = column["arrival_s"]
    first_s = np.where(np.isnan(column["first_token_s"]), now_s, column["first_token_s"])
    turn_s = np.where(np.isnan(column["scheduled_s"]), now_s, column["scheduled_s"])
    finish_s = np.where(np.isnan(column["finish_s"]), now_s, column["finish_s"])
    end_s = {"ttft": first_s, "queue": turn_s, "e2e": finish_s}[limit.latency]
    over = end_s - arrival_s > limit.limit_s
    if not over.any():
        return None
    total_s = (end_s - arrival_s)[over].sum()
    queued_s = (turn_s - arrival_s)[over].sum()
    if is_shared(record) and (found := first_tokens(record, over, now_s)) is not None and limit.latency != "e2e":
        return _side(limit, found.mean_s())
    share = queued_s / max(total_s, 1e-12)
    if share > DOMINANT:
        return (
            f"{limit.name}: requests over the limit spend {percent(share)} of the time waiting for their turn, "
            f"{_why_queued(record)} {QUEUED}"
        )
    prefill_s = float(np.median((first_s - turn_s)[over]))
    tokens = int(np.median(column["input_tokens"][over]))
    return (
        f"{limit.name}: computing the prompt takes {written([prefill_s], Unit.SECONDS)[0]} for the median request over the "
        f"limit ({tokens:,} tokens) (prefill)"
    )


_SIDES = {
    "bootstrap": "the decode pool",
    "wait": "the prefill pool",
    "prefill": "prefill",
    "transfer": "the KV link",
    "admission": "the decode pool",
}


def _side(limit: Limit, parts_s: dict[str, float]) -> str:
    """Name what requests that two instances share waited for most."""
    worst = max(parts_s, key=lambda stage: parts_s[stage])
    share = parts_s[worst] / max(sum(parts_s.values()), 1e-12)
    what = STAGE_LABELS[worst] if worst != "prefill" else "for their prompt to be computed"
    return f"{limit.name}: requests over the limit spend {percent(share)} of the time waiting {what} ({_SIDES[worst]})"


def _why_queued(record: RunRecord) -> str:
    """Say what kept requests out while some were waiting."""
    column = record.iterations
    settings = record.meta["settings"]
    held_up = column["waiting"] > 0
    if not held_up.any():
        return "because each step is long compared with the limit"
    kv_tokens, max_running = (capacity_of(record, name)[column["instance"]] for name in ("kv_tokens", "max_running"))
    kv = float((column["kv_used_tokens"] / np.maximum(kv_tokens, 1))[held_up].mean())
    running = float((column["running"] / np.maximum(max_running, 1))[held_up].mean())
    most, tokens = (f"{int(values[held_up].max()):,}" for values in (max_running, kv_tokens))
    if running >= FULL:
        return f"because {most.replace(',', '')} requests run already (max_running)"
    if kv >= FULL or _sum(record, "retractions"):
        return f"because the KV cache is full ({percent(min(kv, 1.0))} of {tokens} tokens)"
    # Prompts go before decodes: a decode step while somebody waits means that nobody could be let in.
    busy_s = column["end_s"] - column["start_s"]
    refused = busy_s[held_up & (column["mode"] == DECODE)].sum() / max(busy_s[held_up].sum(), 1e-12)
    if settings["batching"] == "prefill-first" and refused > DOMINANT:
        return (
            f"because the KV cache has no room for them and what the running requests may still write ({percent(kv)} of "
            f"{tokens} tokens used)"
        )
    several = len(stages_each(record)) > 1
    return f"because {'the GPUs are' if several else 'the GPU is'} busy with other requests"


def _decoding(record: RunRecord, limit: Limit, idle: bool) -> str:
    """Say what stretched the time between tokens."""
    column = _where_decoded(record)
    busy_s = column["end_s"] - column["start_s"]
    decodes = column["mode"] == DECODE
    if not decodes.any():
        return f"{limit.name}: prompts and decodes share every step (prefill interference)"
    batch = float(np.average(column["decode_tokens"][decodes], weights=busy_s[decodes]))
    step_s = float(np.average(busy_s[decodes], weights=column["decode_tokens"][decodes]))
    requests = "1 request" if round(batch) == 1 else f"{batch:,.0f} requests"
    step = f"a decode step of {requests} takes {written([step_s], Unit.SECONDS)[0]}"
    if idle:
        return f"{limit.name}: {step} even when a request is alone"
    if _sum(record, "retractions"):
        return (
            f"{limit.name}: {_sum(record, 'retractions'):,} times a running request had to give up its KV to others and "
            "start again (KV)"
        )
    # Steps with prompts in them, while others were decoding.
    mixed = ~decodes & (column["running"] > 0)
    share = float(busy_s[mixed].sum() / max(busy_s[mixed].sum() + busy_s[decodes].sum(), 1e-12))
    if share >= INTERFERENCE:
        return (
            f"{limit.name}: {percent(share)} of the GPU time goes to prompts while others wait for their next token, and "
            f"{step} (prefill interference)"
        )
    return f"{limit.name}: {step}; prompts take {percent(share)} of the GPU time (decode batch)"


def _where_decoded(record: RunRecord) -> Mapping[str, np.ndarray]:
    """Rows of iterations.csv without those of instances that prefill alone."""
    alone = [number for pool in pools_of(record) if pool.role == "prefill" for number in pool.numbers]
    rows = ~np.isin(record.iterations["instance"], alone)
    return {name: values[rows] for name, values in record.iterations.items()} if alone else record.iterations


def _sum(record: RunRecord, name: str) -> int:
    return int(record.requests[name].sum())
