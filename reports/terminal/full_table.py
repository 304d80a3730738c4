"""Runs side by side in the terminal, and the same numbers as JSON for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ground.json_file import json_text
from reports.metrics.cuts import cuts_of
from reports.metrics.labels import Summaries, best_of, difference, percent, shown_metrics, values_of, written
from reports.verdict.verdict import Uses, verdict

if TYPE_CHECKING:
    from rich.table import Table

    from reports.record.run_record import RunRecord

__all__ = ["comparison_table", "to_json", "verdict"]

BEST = "*"


def comparison_table(summaries: Summaries) -> Table:
    """One column a run, one row a metric: the best value starred and bold, differences to the first run in percent.

    Three runs fit into 80 columns.
    """
    from rich.table import Table
    from rich.text import Text

    names = list(summaries)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("")
    for place, name in enumerate(names):
        table.add_column(name, justify="right", overflow="fold")
        if place:
            table.add_column("", justify="right", style="dim")
    for number, (title, metrics) in enumerate(shown_metrics(summaries).items()):
        if number:
            table.add_section()
        table.add_row(Text(title, style="bold underline"))
        for metric in metrics:
            values = values_of(metric, summaries)
            cells: list[Text | str] = [metric.label]
            row = zip(values, written(values, metric.unit), best_of(metric, summaries), strict=True)
            for place, (value, text, best) in enumerate(row):
                cells.append(Text(text + (BEST if best else " "), style="bold green" if best else ""))
                if place:
                    cells.append(percent(difference(value, values[0]), signed=True))
            table.add_row(*cells)
    if len(names) > 1:
        table.caption = f"{BEST} best of the row; percentages: against {names[0]}"
        table.caption_justify = "left"
    return table


def to_json(
    summaries: Summaries,
    folders: Mapping[str, str | Path] | None = None,
    report: str | Path | None = None,
    uses: Uses | None = None,
    records: Mapping[str, RunRecord] | None = None,
) -> str:
    """The summaries as JSON: `{"runs": {name: {"folder": ..., "metrics": {...}, "cut": {...}}}, "report": ...,
    "verdict": [...]}`.

    `folders` says where each run's record lies, `report` where the page is, `uses` where the time went (for the verdict),
    `records` what cut outputs short. All four may be left out.
    """
    runs = {
        name: {"folder": str(folders[name]) if folders and name in folders else None, "metrics": dict(summary)}
        | ({"cut": cuts_of(records[name])} if records is not None else {})
        for name, summary in summaries.items()
    }
    page = None if report is None else str(report)
    return json_text({"runs": runs, "report": page, "verdict": verdict(summaries, uses)})
