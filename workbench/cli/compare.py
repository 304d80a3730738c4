"""``workbench compare``: two run records of one trace, request by request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli.flags import command_with, given
from workbench.cli.trace_flags import TraceFlags, TraceReading

if TYPE_CHECKING:
    from reports.compare.comparison import Comparison


Command = command_with(TraceFlags())


def compare(
    ctx: typer.Context,
    a: Annotated[
        Path, typer.Argument(help="The reference: a run record, usually the measured one.", show_default=False)
    ],
    b: Annotated[Path, typer.Argument(help="The run to judge by it.", show_default=False)],
    origin: Annotated[
        Optional[str],
        typer.Option(
            "--from", help="Latencies begin at: arrival | queued. Default: what the reference says, else arrival."
        ),
    ] = None,
    trace: Annotated[
        Optional[Path],
        typer.Option(
            "--trace",
            help="The trace of both: simulates B again with A's step times, CPU phases and KV capacity for the error budget.",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out", help="Also write a page: both runs side by side with this comparison in it.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare two runs of one trace: errors of latencies, throughput over time, first differing decision, error budget."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _compare(a, b, origin, trace, out, as_json, given(ctx, "reading"))


def _compare(
    path_a: Path,
    path_b: Path,
    origin: str | None,
    trace: Path | None,
    out: Path | None,
    as_json: bool,
    reading: TraceReading,
) -> None:
    from ground.json_file import json_text
    from reports.compare.comparison import compare as compare_records
    from reports.record.load import names_to_show
    from reports.record.run_record import RecordError, read_record
    from reports.record.schema import DECISIONS_FILE
    from workbench.calibrate.budget import error_budget

    if origin not in (None, "arrival", "queued"):
        raise RecordError(f"--from: {origin!r} is not one of arrival, queued")
    a, b = read_record(path_a), read_record(path_b)
    found = compare_records(a, b, origin)
    if path_a.resolve() != path_b.resolve():
        found.a, found.b = names_to_show({path_a: a, path_b: b})
    files = [path / DECISIONS_FILE for path in (path_a, path_b)]
    if all(file.is_file() for file in files):
        from reports.compare.comparison import first_difference

        found.decisions = first_difference(*(_decisions(file) for file in files))
    found.budget = error_budget(a, b, found.latency_from, trace, reading)
    if out is not None:
        _write_page(path_a, path_b, found, out)
    if as_json:
        print(json_text(found.to_dict()))
        return
    _print(found)
    if out is not None:
        print(f"report: {out}")


def _write_page(path_a: Path, path_b: Path, found: Comparison, out: Path) -> None:
    from reports.page.report_page import title_of, write_report
    from reports.record.load import load_runs

    # The requests have been matched: what the records call their trace does not matter any more.
    records = load_runs([path_a, path_b], mixed_traces=True)
    write_report(records, out, title_of(records), "", comparison=found)


def _decisions(path: Path) -> list[dict[str, Any]]:
    from ground.json_file import read_json_lines

    return [line for _, line in read_json_lines(path)]


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from reports.compare.section import COLUMNS, error_rows, sentences

    console = Console()
    console.print(
        f"{found.b} (B) against {found.a} (A): {found.requests} requests, latencies from {found.latency_from}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for row in error_rows(found):
        table.add_row(*row)
    console.print(table)
    for line in sentences(found):
        console.print(line, highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, style="dim")
