"""Runs side by side in a terminal of 80 columns: one line a run, the numbers that decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.metrics.labels import METRICS, Summaries, Unit, best_of, difference, percent, values_of, written
from reports.terminal.full_table import BEST

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "output_throughput": "out tok/s",
    "ttft_p99_s": "TTFT p99",
    "tpot_mean_s": "TPOT mean",
    "e2e_p99_s": "E2E p99",
    "gpu_busy_share": "GPU busy",
    "cache_hit_rate": "hits",
    "retractions": "retr.",
}
_NAME_WIDTH = 18
"""Longer names are folded: the numbers stay in their columns."""
_QUIET = frozenset({"retractions", "cache_hit_rate"})


def compact_table(summaries: Summaries, baseline: str | None = None) -> Table:
    """One row a run, its difference to the baseline on a second, dimmed one; the best value of a column starred.

    80 columns wide at most, however many runs there are.
    """
    from rich.table import Table
    from rich.text import Text

    names = list(summaries)
    base = baseline if baseline is not None and baseline in summaries else names[0]
    shown = [name for name in COLUMNS if _says_something(name, summaries)]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("", max_width=_NAME_WIDTH, overflow="fold")
    for name in shown:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True)
    texts = {name: _short(name, summaries) for name in shown}
    best = {name: best_of(METRICS[name], summaries) for name in shown}
    for place, run in enumerate(names):
        cells: list[Text | str] = [Text(run, style="bold")]
        changes: list[Text | str] = [""]
        for name in shown:
            starred = best[name][place]
            cells.append(Text(texts[name][place] + (BEST if starred else " "), style="bold green" if starred else ""))
            share = difference(summaries[run].get(name), summaries[base].get(name)) if run != base else None
            changes.append(Text(percent(share, signed=True) + " ", style="dim"))
        table.add_row(*cells)
        if run != base:
            table.add_row(*changes)
    if len(names) > 1:
        table.caption = f"{BEST} best of its column; percentages: against {base}"
        table.caption_justify = "left"
    return table


def _says_something(name: str, summaries: Summaries) -> bool:
    known = [value for value in values_of(METRICS[name], summaries) if value is not None]
    return any(known) if name in _QUIET else bool(known)


def _short(name: str, summaries: Summaries) -> list[str]:
    values = values_of(METRICS[name], summaries)
    texts = written(values, METRICS[name].unit)
    # The heading has the unit.
    return [text.removesuffix(" tok/s") for text in texts] if METRICS[name].unit is Unit.TOKENS_PER_S else texts
