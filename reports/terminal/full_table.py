"""Runs side by side in the terminal: every metric a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.metrics.labels import Summaries, best_of, difference, percent, shown_metrics, values_of, written

if TYPE_CHECKING:
    from rich.table import Table

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
