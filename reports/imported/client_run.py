"""A run as its clients saw it, whatever benchmark tool they belong to, and the record that it becomes.

What only the engine knows is left empty: when it queued and scheduled a request, and its iterations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from reports.record.errors import RecordError
from reports.record.meta import HardwareMeta, RunMeta, Totals, TraceMeta
from reports.record.run_record import RunRecord, no_rows
from reports.record.schema import ABORTED, FINISHED, ITERATION_COLUMNS, REJECTED, UNFINISHED

UNKNOWN_MODEL = "unknown"
_PHRASES = {status.phrase.lower(): status.value for status in HTTPStatus}
_LONGEST_ERROR = 100
"""Characters of a tool's error message that a note repeats."""


@dataclass(slots=True)
class ClientRow:
    """One request. Times are seconds on the tool's clock; NaN: it did not happen, or nobody wrote down when."""

    request_id: str
    sent_s: float
    first_token_s: float
    finish_s: float
    """Its last token came; of a failed one: it failed."""
    input_tokens: int
    output_tokens: int
    status: str = FINISHED
    error: str = ""
    """What the tool says of one that failed."""
    cached_tokens: int = 0
    session_id: str = ""
    turn: float = np.nan


@dataclass
class ClientRun:
    """One run of a benchmark tool."""

    path: Path
    tool: str
    """Format of the file, as ``trace.format`` of the record names it."""
    rows: list[ClientRow]
    gaps_s: np.ndarray
    """Between the pieces of each answer, all together; empty where the tool does not say."""
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ours that mean what the engine was started with, and what the clients did."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the tool says of itself and of the load."""
    notes: Sequence[str] = ()


def counted(count: int, what: str) -> str:
    """So many of them, in words."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def closed_loop(places: Any) -> dict[str, int]:
    """The setting of a run that sent a request whenever one of so many places was free; none where that is no number."""
    return {"concurrency": places} if isinstance(places, int) and not isinstance(places, bool) and places > 0 else {}


def failed(error: str, first_token_s: float, http: int | None = None) -> str:
    """The status of a request that failed: turned away, or broken off where a token had come."""
    if not np.isnan(first_token_s):
        return f"{ABORTED}:error"
    code = http if http is not None else _PHRASES.get(error.partition(":")[0].strip().lower())
    return f"{REJECTED}:http_{code}" if code is not None and code >= HTTPStatus.BAD_REQUEST else f"{REJECTED}:error"


def client_record(run: ClientRun, name: str, command: str) -> RunRecord:
    """Bring a run into a record, in order of arrival; its clock starts when the first request was sent.

    Raises RecordError where there is no request, or two have one id.
    """
    if not run.rows:
        raise RecordError(f"{run.path}: no request")
    rows = sorted(run.rows, key=lambda row: row.sent_s)
    twice = [request_id for request_id, count in Counter(row.request_id for row in rows).items() if count > 1]
    if twice:
        raise RecordError(f"{run.path}: two requests are called {twice[0]}")
    start_s = rows[0].sent_s
    unknown = np.full(len(rows), np.nan)
    columns: dict[str, Any] = {
        "request_id": [row.request_id for row in rows],
        "session_id": [row.session_id for row in rows],
        "instance": np.zeros(len(rows), np.int64),
        "arrival_s": np.array([row.sent_s for row in rows]) - start_s,
        "queued_s": unknown,
        "scheduled_s": unknown,
        "first_token_s": np.array([row.first_token_s for row in rows]) - start_s,
        "finish_s": np.array([row.finish_s for row in rows]) - start_s,
        "input_tokens": np.array([row.input_tokens for row in rows], np.int64),
        "output_tokens": np.array([row.output_tokens for row in rows], np.int64),
        "cached_tokens": np.array([row.cached_tokens for row in rows], np.int64),
        "retractions": np.zeros(len(rows), np.int64),
        "status": [row.status for row in rows],
        "turn": np.array([row.turn for row in rows]),
    }
    meta = RunMeta(
        kind="imported",
        name=name,
        command=command,
        latency_from="arrival",
        trace=TraceMeta("", run.tool, "", [*run.notes, *_notes(run)]),
        model=run.model or UNKNOWN_MODEL,
        hardware=HardwareMeta("unknown", None, simulated=False),
        settings={**run.settings, "client": {"tool": run.tool, **run.arguments}},
        versions={},
        totals=Totals(requests=len(rows), ended=sum(row.status != UNFINISHED for row in rows), iterations=0),
        interrupted=False,
    )
    gaps = run.gaps_s, np.ones(len(run.gaps_s), np.int64)
    return RunRecord(meta.to_json(), columns, no_rows(ITERATION_COLUMNS), gaps)


def _notes(run: ClientRun) -> list[str]:
    """What every reader would have to say: what clients cannot know, and what this run's did not see."""
    notes = [
        "seen by clients: when the engine queued and scheduled a request, what it computed in which batch, its "
        "retractions and, unless the tool says so, the tokens in its cache are not known"
    ]
    finished = [row for row in run.rows if row.status == FINISHED]
    whole = sum(bool(np.isnan(row.first_token_s)) and row.output_tokens > 1 for row in finished)
    if whole:
        notes.append(f"{counted(whole, 'answer')} came in one piece: when the first token was out is not known")
    streamed = sum(row.output_tokens - 1 for row in finished if row.output_tokens and not np.isnan(row.first_token_s))
    if len(run.gaps_s) and streamed > 1.02 * len(run.gaps_s):
        notes.append(
            f"{streamed} tokens after the first ones came in {len(run.gaps_s)} pieces: gaps are between pieces"
        )
    lost = Counter(row.error for row in run.rows if row.status not in (FINISHED, UNFINISHED))
    if lost:
        error, count = lost.most_common(1)[0]
        said = error.strip().splitlines()[-1][:_LONGEST_ERROR] if error.strip() else "no reason given"
        of_them = "" if len(lost) == 1 else f", {count} of them"
        notes.append(f"{counted(lost.total(), 'request')} failed{of_them}: {said}")
    return notes
