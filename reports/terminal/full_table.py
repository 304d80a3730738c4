"""Runs side by side in the terminal: every metric a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reports.metrics.labels import Summaries, best_of, difference, percent, shown_metrics, values_of, written

if TYPE_CHECKING:
    from rich.table import Table

BEST = "*"


RANGES = "Where it really would be, 8 times in 10"


def comparison_table(summaries: Summaries, ranges: Mapping[str, Sequence[str]] | None = None) -> Table:
    """One column a run, one row a metric: the best value starred and bold, differences to the first run in percent. At the
    end ``ranges`` of real values, by the name of a metric and for each run.

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
    if ranges:
        table.add_section()
        table.add_row(Text(RANGES, style="bold underline"))
        for label, texts in ranges.items():
            table.add_row(label, texts[0], *[cell for text in texts[1:] for cell in (text, "")])
    if len(names) > 1:
        table.caption = f"{BEST} best of the row; percentages: against {names[0]}"
        table.caption_justify = "left"
    return table
