"""The record of an observed run: what clients saw of a server that somebody else runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from reports.record.meta import HardwareMeta, RunMeta, Totals
from reports.record.run_record import RunRecord, no_rows
from reports.record.schema import ABORTED, FINISHED, ITERATION_COLUMNS, REJECTED
from workbench.clients.bounds import counted
from workbench.clients.observe import Observer, Sent, known_or
from workbench.recording.meta_parts import settings_used, trace_meta, versions

LATE_S = 0.02
"""A client that sends later than this on average is the bottleneck itself: the record says so."""


def observed_record(seen: Observer, trace_sha256: str, command: str) -> RunRecord:
    """Bring what a client saw into a run record. ``queued_s`` and ``scheduled_s`` only the server knows."""
    # A request that was put again in other words arrived then; a record is in order of arrival.
    rows = sorted(seen.rows, key=lambda row: row.arrival_s)
    answers = [row.answer for row in rows]
    nan = np.full(len(rows), np.nan)
    columns: dict[str, Any] = {
        "request_id": [row.request.trace.request_id for row in rows],
        "session_id": [row.request.trace.session_id or "" for row in rows],
        "instance": np.zeros(len(rows), np.int64),
        "arrival_s": np.array([row.arrival_s for row in rows]),
        "queued_s": nan,
        "scheduled_s": nan,
        "first_token_s": np.array([a.chunk_s[0] if a.chunk_s else np.nan for a in answers]),
        "finish_s": np.array([a.finish_s for a in answers]),
        "input_tokens": np.array([known_or(row.answer.prompt_tokens, row.prompt_tokens) for row in rows], np.int64),
        "output_tokens": np.array([known_or(a.output_tokens, len(a.chunk_s)) for a in answers], np.int64),
        "cached_tokens": np.array([a.cached_tokens for a in answers], np.int64),
        "retractions": np.zeros(len(rows), np.int64),
        "status": [a.status for a in answers],
        "slo_ttft_s": np.array([known_or(row.request.trace.slo_ttft_s, np.nan) for row in rows]),
        "slo_tpot_s": np.array([known_or(row.request.trace.slo_tpot_s, np.nan) for row in rows]),
        "priority": np.array([row.request.trace.priority for row in rows], np.int64),
        "turn": np.array([row.request.trace.turn for row in rows], np.int64),
    }
    gaps = np.concatenate([np.empty(0), *(np.diff(a.chunk_s) for a in answers)])
    late = np.array([row.late_s for row in rows]) if rows else np.zeros(1)
    meta = RunMeta(
        kind="observed",
        name="observed",
        command=command,
        model=seen.client.model,
        trace=trace_meta(seen.trace, trace_sha256, _notes(seen, rows, float(late.mean()))),
        hardware=HardwareMeta("unknown", None, simulated=False, url=seen.client.url),
        settings=settings_used(
            seen.settings, model=seen.client.model, dp=1, pp=1, ignore_eos=seen.client.dialect.ignore_eos
        ),
        versions=versions("simpy", "httpx2"),
        interrupted=seen.interrupted,
        totals=Totals(
            requests=len(rows),
            ended=seen.ended,
            iterations=0,
            cut=counted(cut for row in rows if (cut := row.cut()) is not None),
            wall_s=round(seen.now_s(), 6),
            failed=seen.failed,
            pieces=int(sum(len(a.chunk_s) for a in answers)),
            resent=sum(a.resent for a in answers),
            late_mean_s=round(float(late.mean()), 6),
            late_max_s=round(float(late.max()), 6),
        ),
    )
    return RunRecord(meta.to_json(), columns, no_rows(ITERATION_COLUMNS), (gaps, np.ones(len(gaps), np.int64)))


def _notes(seen: Observer, rows: list[Sent], late_s: float) -> list[str]:
    notes = list(seen.client.dialect.notes)
    finished = [row for row in rows if row.answer.status == FINISHED]
    if finished and all(row.answer.output_tokens is None for row in finished):
        notes.append("the server reported no token counts: output tokens are the pieces they came in")
    tokens = sum(row.answer.output_tokens or 0 for row in finished)
    pieces = sum(len(row.answer.chunk_s) for row in finished)
    if tokens > 1.02 * pieces > 0:
        notes.append(f"{tokens} tokens came in {pieces} pieces: gaps in itl.csv are between pieces")
    wrong = sum(known_or(row.answer.prompt_tokens, row.prompt_tokens) != row.prompt_tokens for row in finished)
    if wrong:
        notes.append(f"{wrong} prompts had another length on the server than in the trace")
    short = sum(
        row.answer.output_tokens is not None and row.answer.output_tokens < row.request.trace.output_length
        for row in finished
        if row.cut() is None
    )
    if short:
        notes.append(f"{short} answers ended before the length in the trace")
    for what, has in (
        ("priorities", any(row.request.trace.priority for row in rows)),
        ("adapters", any(row.request.trace.adapter for row in rows)),
    ):
        if has:
            notes.append(f"{what} of the trace were not sent")
    if late_s > LATE_S:
        notes.append(f"this client was {late_s * 1e3:.0f} ms late on average: it is too slow for this load")
    return notes


def failures(record: RunRecord, answers: Observer) -> str | None:
    """One line about requests that failed, or None."""
    lost = [row for row in answers.rows if row.answer.status.split(":")[0] in (REJECTED, ABORTED)]
    if not lost:
        return None
    counts = Counter(row.answer.status for row in lost)
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{len(lost)} of {len(record.requests['status'])} requests failed: {listed}; first: {lost[0].answer.message}"
