"""What is said of pools that prefill and pools that decode: what first tokens wait for, and which side is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from reports.metrics.handovers import STAGE_LABELS, first_tokens
from reports.metrics.instances import Pool, pools_of
from reports.metrics.labels import Unit, percent, written
from reports.metrics.time_use import time_use
from reports.record.run_record import RunRecord

SHORT = 0.2
"""A pool is short when waiting for it is more than this share of the mean TTFT."""
FULL = 0.95
"""A pool's KV, its places or its GPUs are full from this share on."""
OFTEN = 0.1
"""Batches that leave requests behind for less than this share of the time are no sign of a pool that is short."""
_TOLD = 0.02


def pool_sentences(records: Mapping[str, RunRecord]) -> list[str]:
    """Two sentences about each run whose requests are prefilled by one instance and decoded by another."""
    return [line for name, record in records.items() for line in _of_run(name, record)]


def _of_run(name: str, record: RunRecord) -> list[str]:
    found = first_tokens(record)
    if found is None:
        return []
    parts_s = found.mean_s()
    total_s = sum(parts_s.values())
    shares = {stage: part_s / total_s for stage, part_s in parts_s.items()} if total_s > 0 else parts_s
    told = sorted((stage for stage in shares if shares[stage] >= _TOLD), key=lambda stage: -shares[stage])
    listed = ", ".join(f"{percent(shares[stage])} {STAGE_LABELS[stage]}" for stage in told)
    line = f"{name}: of the mean TTFT of {written([total_s], Unit.SECONDS)[0]}, {listed}."
    return [line, f"{name}: {_short(record, shares)}."]


def _short(record: RunRecord, shares: Mapping[str, float]) -> str:
    """Say which side is short, and why."""
    of_role = {role: [pool for pool in pools_of(record) if pool.role == role] for role in ("prefill", "decode")}
    prefill, decode = of_role["prefill"], of_role["decode"]
    if not prefill or not decode:
        return "its record does not tell the pools apart"
    busy = {role: _busy(record, pools) for role, pools in of_role.items()}
    use = f"GPUs compute {percent(busy['prefill'])} of the time in {_named(prefill)}"
    use += f", {percent(busy['decode'])} in {_named(decode)}"
    waits = {
        "prefill": shares["wait"],
        "decode": shares["bootstrap"] + shares["admission"],
        "link": shares["transfer"],
    }
    worst = max(waits, key=lambda side: waits[side])
    if waits[worst] < SHORT:
        for role, pools in of_role.items():
            if busy[role] >= FULL:
                return f"no first token waits long for a pool, but {_named(pools)} has nothing to spare: {use}"
        spare = min(of_role, key=lambda role: busy[role])
        return f"neither side is short, and {_named(of_role[spare])} has the most to spare: {use}"
    share = f"{percent(waits[worst])} of the mean TTFT"
    if worst in of_role and _waited_share(record, of_role[worst]) < OFTEN:
        return f"no side is short: {share} passes until the loop of {_named(of_role[worst])} looks, once a step; {use}"
    if worst == "prefill":
        return f"{_named(prefill)} is short: {share} is waiting for a turn there; {use}"
    if worst == "link":
        settings = record.meta.get("settings") or {}
        link = f" ({settings['kv_link']} a {settings.get('kv_link_per', 'GPU')})" if settings.get("kv_link") else ""
        between = f"the link between {_named(prefill)} and {_named(decode)} is short{link}"
        return f"{between}: {share} is waiting for KV on its way after the prefill; {use}"
    what = "pages" if shares["bootstrap"] >= shares["admission"] else "a place in the batch"
    return f"{_named(decode)} is short: {share} is waiting for {what} there{_why_full(record, decode)}; {use}"


def _named(pools: Sequence[Pool]) -> str:
    if len(pools) > 1:
        return f"the pools that {pools[0].role}"
    pool = pools[0]
    return f"the {pool.role} pool" + ("" if pool.name == pool.role else f" ({pool.name})")


def _busy(record: RunRecord, pools: Sequence[Pool]) -> float:
    use = time_use(record, [number for pool in pools for number in pool.numbers])
    return sum(use.busy_s.values()) / use.gpu_s if use is not None else 0.0


def _left_waiting(record: RunRecord, pools: Sequence[Pool]) -> np.ndarray:
    """Tell which rows of iterations.csv are batches of these pools that left a request behind."""
    column = record.iterations
    here = np.isin(column["instance"], [number for pool in pools for number in pool.numbers])
    return here & (column["waiting"] > 0)


def _waited_share(record: RunRecord, pools: Sequence[Pool]) -> float:
    """The share of these pools' batches, by time, that left a request behind."""
    column = record.iterations
    seconds = column["end_s"] - column["start_s"]
    here = np.isin(column["instance"], [number for pool in pools for number in pool.numbers])
    return float(seconds[_left_waiting(record, pools)].sum() / max(seconds[here].sum(), 1e-12))


def _why_full(record: RunRecord, pools: Sequence[Pool]) -> str:
    """Say what of the decode side is full while requests wait for it; nothing where that is not to be seen."""
    column = record.iterations
    for pool in pools:
        mine = _left_waiting(record, [pool])
        if not mine.any():
            continue
        kv = float(column["kv_used_tokens"][mine].mean()) / max(pool.kv_tokens, 1)
        running = float(column["running"][mine].mean()) / max(pool.max_running or np.inf, 1)
        if running >= FULL:
            return f", where {pool.max_running:,} requests run already (max_running)"
        if pool.kv_tokens:
            return f", where {percent(min(kv, 1.0))} of {pool.kv_tokens:,} tokens of KV are in use while requests wait"
    return ""
