"""The numbers of runs as JSON, for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ground.json_file import json_text
from reports.metrics.cuts import cuts_of
from reports.metrics.handovers import first_tokens
from reports.metrics.how_sure import accuracy_numbers
from reports.metrics.labels import Summaries
from reports.metrics.pool_use import pool_numbers
from reports.metrics.seeds import seed_numbers
from reports.record.run_record import RunRecord
from reports.verdict.verdict import Uses, verdict


def to_json(
    summaries: Summaries,
    folders: Mapping[str, str | Path] | None = None,
    report: str | Path | None = None,
    uses: Uses | None = None,
    records: Mapping[str, RunRecord] | None = None,
    by_seed: Sequence[Summaries] = (),
) -> str:
    """Lay the summaries out as JSON: `{"runs": {name: {"folder": ..., "metrics": {...}, "cut": {...}}}, "report": ...,
    "verdict": [...]}`.

    A run of several pools has `"pools": [...]` beside its metrics, what each of them did, and one whose requests are
    prefilled and decoded by different instances `"ttft": {"mean_s": {...}, "slowest_tenth_s": {...}}`, what first tokens
    waited for. A modelled run has `"accuracy"`: how far off predictions like it were, between what its real values would be
    (`ranges`), and what its times rest on.

    `folders` says where each run's record lies, `report` where the page is, `uses` where the time went (for the verdict),
    `records` what cut outputs short, `by_seed` the same summaries seed by seed. All may be left out.
    """
    runs = {
        name: {"folder": str(folders[name]) if folders and name in folders else None, "metrics": dict(summary)}
        | ({"cut": cuts_of(records[name])} if records is not None else {})
        | ({"ttft": found} if records is not None and (found := _first_tokens(records[name])) else {})
        | ({"accuracy": sure} if records is not None and (sure := accuracy_numbers(records[name], summary)) else {})
        | ({"seeds": seed_numbers(by_seed)[name]} if by_seed else {})
        | ({"pools": pools} if records is not None and (pools := pool_numbers(records[name])) else {})
        for name, summary in summaries.items()
    }
    page = None if report is None else str(report)
    return json_text({"runs": runs, "report": page, "verdict": verdict(summaries, uses, records)})


def _first_tokens(record: RunRecord) -> dict[str, dict[str, float]] | None:
    found = first_tokens(record)
    return None if found is None else {"mean_s": found.mean_s(), "slowest_tenth_s": found.slow_s()}
