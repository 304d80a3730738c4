"""Run records for tests: one made by a toy serving loop, and the pieces to write one down by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from reports.record.run_record import IterationLog, RunRecord
from reports.record.schema import DECODE, ITERATION_COLUMNS, PREFILL, REQUEST_COLUMNS, Kind

HOST_S = {"receive": 20e-6, "schedule": 150e-6, "launch": 400e-6, "process": 250e-6}


def request_row(**values: Any) -> dict[str, Any]:
    """One row of requests.csv; what is not said is empty, zero, or `finished`."""
    empty = {Kind.TEXT: "", Kind.INT: 0, Kind.TIME: np.nan, Kind.NUMBER: np.nan}
    return {name: empty[kind] for name, kind in REQUEST_COLUMNS.items()} | {"status": "finished"} | values


def iteration_row(**values: Any) -> dict[str, Any]:
    """One row of iterations.csv, in the order of its columns; what is not said is zero."""
    return {name: 0.0 if kind is Kind.TIME else 0 for name, kind in ITERATION_COLUMNS.items()} | values


def record_of(
    requests: list[dict[str, Any]],
    iterations: list[dict[str, Any]] = (),  # type: ignore[assignment]
    itl: dict[float, int] | None = None,
    **meta: Any,
) -> RunRecord:
    """A record from rows."""
    log = IterationLog()
    for row in iterations:
        log.append(tuple(row.values()))
    gaps = sorted((itl or {}).items())
    return RunRecord(
        meta={"name": "by hand", "settings": {}, **meta},
        requests={name: [row[name] for row in requests] for name in REQUEST_COLUMNS},
        iterations=log.columns(),
        itl=(np.array([gap for gap, _ in gaps]), np.array([count for _, count in gaps], dtype=np.int64)),
    )


def toy_run(loop: str = "normal", number: int = 120, rate: float = 12.0, seed: int = 0, pp: int = 1) -> RunRecord:
    """What a loop with `pp` stages might leave behind; plausible, not right.

    The CPU keeps one batch in flight (`normal`), two (`overlap`) or one a stage (`pipeline`) and works on the next
    meanwhile.
    """
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate, number))
    rows = [
        request_row(
            request_id=f"r{i}",
            session_id=f"s{i % 7}",
            arrival_s=float(arrival_s[i]),
            input_tokens=int(random.integers(50, 3000)),
            output_tokens=int(random.integers(1, 160)),
            cached_tokens=int(random.integers(0, 50)),
            turn=float(i // 7),
        )
        for i in range(number)
    ]
    in_flight_limit = {"normal": 1, "overlap": 2, "pipeline": pp}[loop]
    sets: list[list[int]] = [[] for _ in range(pp if loop == "pipeline" else 1)]
    log, gaps = IterationLog(), Counter[float]()
    waiting, left = list(range(number)), [row["output_tokens"] for row in rows]
    last_token_s: dict[int, float] = {}
    flying: list[tuple[list[int], float, list[int]]] = []
    free_s, now_s, iteration = [0.0] * pp, 0.0, 0
    while waiting or any(sets) or flying:
        running = sets[iteration % len(sets)]
        ready = [i for i in waiting[:4] if arrival_s[i] <= now_s]
        batch = ready or [i for i in running if left[i] > sum(i in members for members, _, _ in flying)]
        if batch:
            tokens = sum(rows[i]["input_tokens"] for i in ready) if ready else len(batch)
            begin_s = now_s
            now_s += HOST_S["receive"] + HOST_S["schedule"] + HOST_S["launch"]
            for i in ready:
                rows[i] |= {"queued_s": max(begin_s, float(arrival_s[i])), "scheduled_s": begin_s}
                waiting.remove(i)
                running.append(i)
            forward_s = (2e-3 + tokens * 2.5e-5 if ready else 2.5e-3 + len(batch) * 2e-5) / pp
            earliest_s = now_s
            for stage in range(pp):
                start_s = max(earliest_s, free_s[stage])
                free_s[stage] = earliest_s = start_s + forward_s
                host_s: list[Any] = [HOST_S[phase] if stage == 0 else 0.0 for phase in HOST_S]
                row = (
                    *(iteration, 0, stage, PREFILL if ready else DECODE, now_s, start_s, earliest_s, len(batch)),
                    *(tokens if ready else 0, 0 if ready else len(batch), 300 * len(batch)),
                    sum(rows[i]["input_tokens"] for group in sets for i in group),
                    int((arrival_s[waiting] <= now_s).sum()),
                    *(sum(map(len, sets)), *host_s),
                )
                log.append(row)
            flying.append((batch, earliest_s, running))
        elif not flying:
            now_s = float(arrival_s[waiting[0]])
            continue
        iteration += 1
        if len(flying) < in_flight_limit and batch:
            continue
        members, done_s, group = flying.pop(0)
        now_s = max(now_s, done_s) + HOST_S["process"]
        for i in members:
            left[i] -= 1
            if i in last_token_s:
                gaps[round(now_s - last_token_s[i], 9)] += 1
            else:
                rows[i]["first_token_s"] = now_s
            last_token_s[i] = now_s
            if left[i] == 0:
                rows[i]["finish_s"] = now_s
                group.remove(i)
    columns = log.columns()
    itl_s = np.array(sorted(gaps))
    return RunRecord(
        meta={
            "name": loop,
            "trace": {"name": "toy", "sha256": "0" * 64, "notes": ["made up by tests/reports/records.py"]},
            "model": "toy/model-1B",
            "hardware": "one toy GPU" if pp == 1 else f"{pp} toy GPUs",
            "settings": {"loop": loop, "dp": 1, "pp": pp, "chunk": 8192, "policy": "fcfs"},
            "versions": {"workbench": "0.0"},
            "totals": {"requests": number},
            "interrupted": False,
        },
        requests={name: [row[name] for row in rows] for name in REQUEST_COLUMNS},
        iterations=columns,
        itl=(itl_s, np.array([gaps[gap] for gap in itl_s.tolist()], dtype=np.int64)),
    )
