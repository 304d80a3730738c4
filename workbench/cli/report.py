"""``workbench report``: finished runs side by side, as a page, a table, a timeline for Perfetto, figures for a paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from workbench.cli.options import option

if TYPE_CHECKING:
    from reports.metrics.report_numbers import Report
    from reports.record.run_record import RunRecord

_OUT, _WHAT = "Output", "Comparison"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of run records, or folders that hold several.", show_default=False
        ),
    ],
    out: Annotated[
        Optional[Path],
        option("--out", help="The page. Default: report.html in the folder given, or here if several are.", panel=_OUT),
    ] = None,
    trace_events: Annotated[
        Optional[Path],
        option("--trace-events", help="Also write the timeline for Perfetto: FILE.json or FILE.json.gz.", panel=_OUT),
    ] = None,
    figures: Annotated[
        Optional[str], option("--figures", help="Also draw figures: png | svg | pdf.", panel=_OUT)
    ] = None,
    figures_dir: Annotated[
        Optional[Path], option("--figures-dir", help="Folder for them. Default: figures, beside the page.", panel=_OUT)
    ] = None,
    full: Annotated[bool, option("--full", help="Print every metric, not one line a run.", panel=_OUT)] = False,
    as_json: Annotated[bool, option("--json", help="Print the numbers as JSON.", panel=_OUT)] = False,
    baseline: Annotated[
        Optional[str],
        option("--baseline", help="The run that others are compared with. Default: the first.", panel=_WHAT),
    ] = None,
    slo_ttft: Annotated[
        Optional[float],
        option("--slo-ttft", help="Seconds; goodput counts requests within it. Default: the run's own.", panel=_WHAT),
    ] = None,
    slo_tpot: Annotated[Optional[float], option("--slo-tpot", help="Seconds a token; as above.", panel=_WHAT)] = None,
    prices: Annotated[
        Optional[Path],
        option("--prices", help="TOML table of what a GPU costs an hour. Default: the run's own, if any.", panel=_WHAT),
    ] = None,
    mixed_traces: Annotated[
        bool, option("--mixed-traces", help="Compare runs of different traces all the same.", panel=_WHAT)
    ] = False,
) -> None:
    """Compare finished runs, simulated or real: one self-contained HTML page that says which wins and why."""
    from ground.errors import InputError
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        if figures is not None and figures not in ("png", "svg", "pdf"):
            raise InputError(f"--figures {figures}: choose png, svg or pdf")
        from reports.page.report_page import title_of, write_report
        from reports.record.load import load_runs

        records = load_runs(runs, mixed_traces)
        if prices is not None:
            _price(records, prices)
        page = out if out is not None else (runs[0] if len(runs) == 1 else Path()) / "report.html"
        made = write_report(records, page, title_of(records), "", slo_ttft, slo_tpot, baseline)
        written = [f"report: {page}"]
        if trace_events is not None:
            from reports.exports.trace_events import write_trace_events

            number = write_trace_events(records, trace_events)
            written.append(f"timeline: {trace_events} ({number:,} events; open it at ui.perfetto.dev)")
        if figures is not None:
            from reports.exports.figures import write_figures

            folder = figures_dir if figures_dir is not None else page.parent / "figures"
            files = write_figures(made, folder, figures)
            written.append(f"figures: {folder} ({', '.join(file.name for file in files)})")
        _print(made, page, full, as_json, written)


def _price(records: Mapping[str, RunRecord], prices_file: Path) -> None:
    """Give each record the prices of its GPUs."""
    from reports.metrics.instances import pools_of
    from workbench.search.prices import kept_with, read_prices

    table = read_prices(prices_file)
    for record in records.values():
        record.meta["prices"] = kept_with(table, {pool.gpu: None for pool in pools_of(record)})


def _print(made: Report, page: Path, full: bool, as_json: bool, written: list[str]) -> None:
    from rich.console import Console

    from reports.exports.runs_json import to_json
    from reports.metrics.how_sure import accuracy_lines, difference_lines, range_rows
    from reports.terminal.compact_table import compact_table
    from reports.terminal.full_table import comparison_table
    from reports.verdict.caveats import caveats
    from reports.verdict.verdict import verdict

    if as_json:
        print(to_json(made.numbers, report=page, uses=made.uses, records=made.records))
        return
    console = Console()
    ranges = range_rows(made.records, made.summaries)
    console.print(comparison_table(made.numbers, ranges) if full else compact_table(made.numbers, made.baseline))
    for line in verdict(made.summaries, made.uses, made.records):
        console.print(f"- {line}", highlight=False, markup=False)
    for line in (*difference_lines(made.summaries, made.records, made.baseline), *accuracy_lines(made.records)):
        console.print(line, highlight=False, markup=False, style="dim")
    for line in caveats(made.records):
        console.print(f"note: {line}", highlight=False, markup=False, style="dim")
    for line in written:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def diff_config(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run record.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.", show_default=False)] = False,
) -> None:
    """Show what differs between two runs' settings: model, hardware, trace, every setting, versions."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from reports.compare.differing_settings import differing_settings
        from reports.record.load import told_apart
        from reports.record.run_record import read_meta

        metas = [read_meta(one), read_meta(other)]
        names = [str(meta.get("name") or folder.name) for meta, folder in zip(metas, (one, other), strict=True)]
        if names[0] == names[1]:
            names = told_apart([one, other]) if one.resolve() != other.resolve() else [str(one), str(other)]
        rows = differing_settings(metas)
        if as_json:
            from ground.json_file import json_text

            print(json_text({name: dict(zip(names, texts, strict=True)) for name, texts in rows.items()}))
            return
        from rich.console import Console
        from rich.table import Table

        if not rows:
            print("no setting differs")
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for heading in ("", *names):
            table.add_column(heading, overflow="fold")
        for name, texts in rows.items():
            table.add_row(name, *(text if text else "-" for text in texts))
        Console(highlight=False).print(table)
