"""All numbers of the runs that one report is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reports.metrics.labels import Summaries
from reports.metrics.summary import summarise
from reports.metrics.time_use import TimeUse, time_use
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord


@dataclass(frozen=True)
class Report:
    """The runs of a report by the name to show, their numbers, and the one they are compared with."""

    records: Mapping[str, RunRecord]
    summaries: Summaries
    uses: Mapping[str, TimeUse | None]
    baseline: str

    @property
    def numbers(self) -> Summaries:
        """The summaries with the shares of GPU time in them: all numbers of the table."""
        return {
            name: {**summary, **(use.shares() if (use := self.uses[name]) is not None else {})}
            for name, summary in self.summaries.items()
        }


def make_report(
    records: Mapping[str, RunRecord],
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    baseline: str | None = None,
) -> Report:
    """Compute everything that is said about `records`. Without an SLO here that of a run's settings counts.

    Raises `RecordError` without a record, and for a baseline that is none of them.
    """
    if not records:
        raise RecordError("no run to report on")
    if baseline is not None and baseline not in records:
        raise RecordError(f"no run is called {baseline}; the runs are {', '.join(records)}")
    summaries = {}
    for name, record in records.items():
        settings = record.meta.get("settings") or {}
        ttft_s = slo_ttft_s if slo_ttft_s is not None else settings.get("slo_ttft")
        tpot_s = slo_tpot_s if slo_tpot_s is not None else settings.get("slo_tpot")
        summaries[name] = summarise(record, ttft_s, tpot_s)
    uses = {name: time_use(record) for name, record in records.items()}
    return Report(records, summaries, uses, baseline if baseline is not None else next(iter(records)))
