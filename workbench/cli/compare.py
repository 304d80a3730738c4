"""``workbench compare``: two run records of one trace, request by request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from reports.compare import Comparison


def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a run record, usually the measured one.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The run to judge by it.", show_default=False)],
    origin: Annotated[Optional[str], typer.Option("--from", help="Latencies begin at: arrival | queued. Default: what the reference says, else arrival.")] = None,
    trace: Annotated[Optional[Path], typer.Option("--trace", help="The trace of both: simulates B again with A's step times, CPU phases and KV capacity for the error budget.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:  # fmt: skip
    """Compare two runs of one trace: errors of latencies, throughput over time, first differing decision, error budget."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _compare(a, b, origin, trace, as_json)


def _compare(path_a: Path, path_b: Path, origin: str | None, trace: Path | None, as_json: bool) -> None:
    from reports.compare import compare as compare_records
    from reports.record import RecordError, read_record
    from reports.schema import DECISIONS_FILE
    from workbench.run.budget import error_budget

    if origin not in (None, "arrival", "queued"):
        raise RecordError(f"--from: {origin!r} is not one of arrival, queued")
    a, b = read_record(path_a), read_record(path_b)
    found = compare_records(a, b, origin)
    files = [path / DECISIONS_FILE for path in (path_a, path_b)]
    if all(file.is_file() for file in files):
        from reports.compare import first_difference

        found.decisions = first_difference(*(_decisions(file) for file in files))
    found.budget = error_budget(a, b, found.latency_from, trace)
    if as_json:
        print(json.dumps(_finite(found.to_dict()), indent=2, allow_nan=False))
        return
    _print(found)


def _decisions(path: Path) -> list[dict[str, Any]]:
    from reports.record import RecordError

    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise RecordError(f"{path}: line {number}: {error}") from error
    return lines


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from reports.compare import LATENCIES

    console = Console()
    console.print(
        f"{found.b} against {found.a}: {found.requests} requests, latencies from {found.latency_from}", highlight=False
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("mean of A", "error", "p50", "p90", "p99", "each, mean", "median", "signed"):
        table.add_column(title, justify="right")
    for name in LATENCIES:
        error = found.latencies.get(name)
        if error is None:
            continue
        table.add_row(
            {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "queue": "Queueing"}[name], _time(error.reference_mean_s),
            *(_percent(value) for value in (error.mean, *error.percentiles.values())),
            *(_percent(value, signed=False) for value in (error.absolute_mean, error.absolute_median)),
            _percent(error.signed_mean),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"duration {found.duration_a_s:.2f} s and {found.duration_b_s:.2f} s ({found.duration_b_s / found.duration_a_s - 1:+.1%}); "
        f"output tokens/s over time differ by {found.throughput_error:.1%} on average", highlight=False,
    )  # fmt: skip
    _print_decisions(console, found.decisions)
    for line in found.budget.get("lines", ()):
        console.print(line, highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, style="dim")


def _print_decisions(console: Any, decisions: dict[str, Any] | None) -> None:
    if decisions is None:
        return
    if decisions["equal"]:
        console.print(f"decisions: the same in all {decisions['batches']:,} batches", highlight=False)
    else:
        what = ", ".join(decisions["differs_in"])
        console.print(
            f"decisions part at batch {decisions['batch']:,} of instance {decisions['instance']}: {what}",
            highlight=False,
        )


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _percent(value: float | None, signed: bool = True) -> str:
    if value is None or value != value:
        return ""
    return f"{value:+.1%}" if signed else f"{value:.1%}"
