"""Single requests as the page holds them: their moments, and every chunk and retraction on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from reports.metrics.handovers import is_shared
from reports.metrics.host_lane import first_stage_rows, results_s
from reports.metrics.summary import run_span
from reports.record.run_record import RunRecord
from reports.record.schema import CHUNK
from reports.timeline.packed import differences, packed, packed_text, tick_s_of

TICK_S = 1e-9
MOST_REQUESTS = 20_000
BYTES_A_REQUEST = 40
"""Size of one request in one run, packed, with its chunks: to guess how many fit."""


def request_details(records: Mapping[str, RunRecord], budget_bytes: int) -> dict[str, Any]:
    """`ids` of the requests held, and per run a packed table of them and one of their chunks and retractions.

    The same requests of every run: the slowest of any run by several measures, then ever sparser through the rest.
    """
    wanted = min(MOST_REQUESTS, max(200, budget_bytes // (BYTES_A_REQUEST * len(records))))
    ids, total = _chosen(records, wanted)
    place = {request_id: number for number, request_id in enumerate(ids)}
    spans = [span for record in records.values() if (span := run_span(record)) is not None]
    tick_s = tick_s_of(max((abs(moment_s) for span in spans for moment_s in span), default=0.0), TICK_S)
    return {
        "tick_s": tick_s,
        "total": total,
        "ids": packed_text(ids),
        "runs": {name: _of_run(record, place, tick_s) for name, record in records.items()},
    }


def slowness(record: RunRecord) -> dict[str, np.ndarray]:
    """Per request: `e2e`, `ttft`, `tpot` and `queue` in seconds; NaN where a request has none."""
    column = record.requests
    gaps = column["output_tokens"] - 1
    with np.errstate(invalid="ignore"):
        return {
            "e2e": column["finish_s"] - column["arrival_s"],
            "ttft": column["first_token_s"] - column["arrival_s"],
            "tpot": np.where(gaps > 0, (column["finish_s"] - column["first_token_s"]) / np.maximum(gaps, 1), np.nan),
            "queue": column["scheduled_s"] - column["arrival_s"],
        }


def _chosen(records: Mapping[str, RunRecord], wanted: int) -> tuple[list[str], int]:
    order: dict[str, None] = {}
    everyone: dict[str, None] = {}
    for record in records.values():
        everyone |= dict.fromkeys(record.requests["request_id"])
    if len(everyone) <= wanted:
        return list(everyone), len(everyone)
    most = max(20, wanted // (8 * len(records)))
    for record in records.values():
        names = record.requests["request_id"]
        for values in slowness(record).values():
            slowest = np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable")[:most]
            order |= dict.fromkeys(names[row] for row in slowest.tolist())
    rest = list(everyone)
    left = max(wanted - len(order), 1)
    order |= dict.fromkeys(rest[:: max(len(rest) // left, 1)])
    return [request_id for request_id in rest if request_id in order], len(everyone)


def _of_run(record: RunRecord, place: Mapping[str, int], tick_s: float) -> dict[str, Any]:
    column = record.requests
    rows = np.array([row for row, request_id in enumerate(column["request_id"]) if request_id in place], dtype=np.int64)
    number = np.array([place[column["request_id"][row]] for row in rows.tolist()], dtype=np.int64)
    rows, number = rows[np.argsort(number, kind="stable")], np.sort(number)
    ticks = {name: _ticks(column[name][rows], tick_s) for name in _MOMENTS}
    statuses = list(dict.fromkeys(column["status"]))
    table: dict[str, np.ndarray] = {"number": differences(number), "arrival_s": differences(ticks["arrival_s"])}
    moments = list(_MOMENTS[1:])
    if is_shared(record):
        moments += _HANDOVER_MOMENTS
        ticks |= {name: _ticks(column[name][rows], tick_s) for name in _HANDOVER_MOMENTS}
    for name in moments:
        # -1 stands for a moment that never came.
        table[name] = np.where(np.isnan(column[name][rows]), -1, ticks[name] - ticks["arrival_s"])
    for name in ("input_tokens", "output_tokens", "cached_tokens", "retractions", "instance"):
        table[name] = column[name][rows]
    table["status"] = np.array([statuses.index(column["status"][row]) for row in rows.tolist()], dtype=np.int64)
    arrival_of = dict(zip(number.tolist(), ticks["arrival_s"].tolist(), strict=True))
    return {
        "statuses": statuses,
        "requests": packed(table),
        "events": packed(_events(record, place, arrival_of, tick_s)),
    }


_MOMENTS = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s")
_HANDOVER_MOMENTS = ("bootstrap_s", "transfer_end_s", "decode_admission_s")
"""Of requests that one instance prefills and another decodes."""


def _ticks(seconds: np.ndarray, tick_s: float) -> np.ndarray:
    return np.rint(np.nan_to_num(seconds) / tick_s).astype(np.int64)


def _events(
    record: RunRecord, place: Mapping[str, int], arrival_of: Mapping[int, int], tick_s: float
) -> dict[str, np.ndarray]:
    """`number`, `begin` (ticks since the arrival) and `lasts` of each chunk; a retraction begins when it was decided."""
    column, events = record.iterations, record.events
    shown = np.array([place.get(request_id) in arrival_of for request_id in events["request_id"]], dtype=bool)
    found: list[tuple[int, int, int, int, int]] = []
    for instance in np.unique(events["instance"][shown]).tolist():
        rows = first_stage_rows(column, instance)
        rows = rows[np.argsort(column["iteration"][rows], kind="stable")]
        of = np.flatnonzero(shown & (events["instance"] == instance))
        at = np.searchsorted(column["iteration"][rows], events["iteration"][of])
        there = at < len(rows)  # an interrupted run may lack its last iterations
        there[there] = column["iteration"][rows[at[there]]] == events["iteration"][of[there]]
        of, rows = of[there], rows[at[there]]
        decided_s = (column["launch_s"] - column["launch_host_s"])[rows]
        moments = (
            _ticks(each, tick_s).tolist() for each in (column["start_s"][rows], results_s(column, rows), decided_s)
        )
        for event, start, end, decided in zip(of.tolist(), *moments, strict=True):
            number = place[events["request_id"][event]]
            chunk = events["event"][event] == CHUNK
            begin = (start if chunk else decided) - arrival_of[number]
            found.append((number, begin, end - start if chunk else 0, int(events["tokens"][event]), int(not chunk)))
    found.sort()
    table = np.array(found, dtype=np.int64).reshape(len(found), 5)
    names = ("number", "begin", "lasts", "tokens", "retracted")
    return {name: differences(table[:, 0]) if name == "number" else table[:, at] for at, name in enumerate(names)}


class Part(NamedTuple):
    """A stretch of a request's time: `queued`, `prefill`, `waiting` (between chunks), `decode`, `retracted`; of one that two
    instances share also `bootstrap` (until pages are set aside where it is decoded), `transfer` (its KV is on its way) and
    `admission` (its KV is there, and it waits for a place)."""

    kind: str
    begin_s: float
    end_s: float
    tokens: int


def request_parts(record: RunRecord) -> list[list[Part]]:
    """Divide the time of each request from arrival to finish, in the record's order; nothing for one without an end.

    waterfall.js draws requests by the same rule.
    """
    column, iterations = record.requests, record.iterations
    place = {request_id: row for row, request_id in enumerate(column["request_id"])}
    everything = _events(record, place, dict.fromkeys(range(len(place)), 0), TICK_S)
    events: dict[int, list[tuple[float, float, int, bool]]] = {}
    rows = np.cumsum(everything["number"]).tolist()
    for row, begin, lasts, tokens, lost in zip(
        rows, *(everything[name].tolist() for name in ("begin", "lasts", "tokens", "retracted")), strict=True
    ):
        events.setdefault(row, []).append((begin * TICK_S, lasts * TICK_S, tokens, bool(lost)))
    last_s = float(iterations["end_s"].max()) if len(iterations["end_s"]) else np.nan
    found = []
    for row in range(len(column["request_id"])):
        finish_s = float(column["finish_s"][row])
        end_s = last_s if np.isnan(finish_s) else finish_s
        found.append(_parts(column, row, end_s, events.get(row, [])))
    return found


def _parts(
    column: Mapping[str, Any], row: int, end_s: float, events: list[tuple[float, float, int, bool]]
) -> list[Part]:
    arrival_s, scheduled_s, first_s = (
        float(column[name][row]) for name in ("arrival_s", "scheduled_s", "first_token_s")
    )
    if np.isnan(end_s) or end_s <= arrival_s:
        return []
    parts: list[Part] = []
    bootstrap_s, arrived_s, admitted_s = (float(column[name][row]) for name in _HANDOVER_MOMENTS)

    def add(kind: str, begin_s: float, till_s: float, tokens: int = 0) -> None:
        begin_s, till_s = max(begin_s, arrival_s), min(till_s, end_s)
        if till_s > begin_s:
            parts.append(Part(kind, begin_s, till_s, tokens))

    at_s = arrival_s
    if bootstrap_s > at_s:
        add("bootstrap", at_s, bootstrap_s)
        at_s = bootstrap_s
    if np.isnan(scheduled_s):
        shared = not np.isnan(column["prefill_instance"][row]) and np.isnan(bootstrap_s)
        add("bootstrap" if shared else "queued", at_s, end_s)
        return parts
    if not events:
        prefilled_s = end_s if np.isnan(first_s) else first_s
        add("queued", at_s, scheduled_s)
        add("prefill", scheduled_s, prefilled_s)
        add("decode", prefilled_s, end_s, int(column["output_tokens"][row]))
        return parts
    state = "queued"
    for number, (begin_s, lasts_s, tokens, lost) in enumerate(events):
        add(state, at_s, begin_s)
        at_s = max(at_s, begin_s)
        if lost:
            state = "retracted"
            continue
        add("prefill", at_s, begin_s + lasts_s, tokens)
        at_s = max(at_s, begin_s + lasts_s)
        after = events[number + 1 :]
        # More chunks before anything is lost: the prompt is not complete yet.
        state = "waiting" if after and not after[0][3] else "decode"
        if state == "decode":
            for kind, till_s in (("transfer", arrived_s), ("admission", admitted_s)):
                if till_s > at_s:
                    add(kind, at_s, till_s)
                    at_s = till_s
    add(state, at_s, end_s)
    return parts
