"""The common part of ``simulate`` and ``replay``: running a trace under several loops, records, comparison, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reports.record.schema import PAGE_FILE
from workbench.cli.trace_flags import TraceReading
from workbench.clients.trace_input import open_as, reshaped
from workbench.recording.run_folder import run_folder

if TYPE_CHECKING:
    from reports.metrics.labels import Summaries
    from reports.metrics.report_numbers import Report
    from reports.record.run_record import RunRecord
    from traces import Trace
    from workbench.settings.run_settings import LoadSettings, RunSettings


def command_line() -> str:
    """The command line for a record, without its secret."""
    words = ["workbench", *sys.argv[1:]]
    for i, word in enumerate(words):
        if word.startswith("--api-key="):
            words[i] = "--api-key=***"
        elif i and words[i - 1] == "--api-key":
            words[i] = "***"
    return " ".join(words)


def open_reshaped(path: Path, reading: TraceReading, settings: LoadSettings) -> Trace:
    """The trace as the settings want it. Raises TraceError, and ValueError for flags of the trace that make no sense."""
    return reshaped(open_as(path, reading, ordered=settings.concurrency is None, seed=settings.seed), settings)


def run_and_report(
    trace: Trace,
    settings: RunSettings,
    out: Path | None,
    force: bool,
    as_json: bool,
    decisions: bool,
    run_one: Callable[..., RunRecord],
    done: str,
    again: Sequence[Callable[[], Summaries]] = (),
) -> None:
    """Run every loop with ``run_one(settings, loop, trace, ...)``, write the records, print and write the comparison; beside it
    what becomes of the numbers ``again``, with other seeds.

    Raises typer.Exit with 130 after an interrupt and 2 when no request could be served at all; whatever ``run_one`` raises.
    """
    from reports.metrics.refused import refused
    from reports.record.run_record import prepare_out

    folder = out if out is not None else free_folder(Path("runs") / trace.info.name)
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    prepare_out(folder, force)
    try:
        # The last record is written while the page is made.
        with ThreadPoolExecutor(1) as writer:
            records, interrupted, writing = _run_all(trace, settings, folder, decisions, as_json, run_one, done, writer)
            made = _write_page(records, folder, settings)
            writing.result()
    except BaseException:
        _clear_leftovers(folder, new)
        raise
    by_seed = [made.summaries, *(run() for run in again)] if again and not interrupted else []
    _print(made, folder, as_json, by_seed)
    if interrupted:
        print(f"interrupted: what was {done} is in {folder}", file=sys.stderr)
        raise typer.Exit(130)
    lost = [found for name, record in records.items() if (found := refused(record, name)) is not None]
    nothing = len(lost) == len(records) and all(found.everything for found in lost)
    for found in lost:
        print(f"{'error' if nothing else 'warning'}: {found.sentence}", file=sys.stderr)
    if nothing:
        raise typer.Exit(2)


def _run_all(
    trace: Trace,
    settings: RunSettings,
    folder: Path,
    decisions: bool,
    quiet: bool,
    run_one: Callable[..., RunRecord],
    done: str,
    writer: Executor,
) -> tuple[dict[str, RunRecord], bool, Future[None]]:
    """Run every loop and write its record. Stops after an interrupt, keeping what there is.

    Returns the records, whether it was interrupted, and the writing of the last record.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from reports.record.run_record import write_record
    from workbench.cluster.interrupts import noted_interrupts

    command = command_line()
    sha256 = trace.sha256()
    records: dict[str, RunRecord] = {}
    writing: Future[None] | None = None
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:8}"),
        TextColumn("{task.fields[done]:,} requests"),
        TextColumn("{task.fields[simulated]} " + done),
        TextColumn("{task.fields[speed]}"),
    )
    with noted_interrupts() as interrupt, Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        for name in settings.loops:
            if writing is not None:
                writing.result()  # a real run is not to share its CPU
            task = bar.add_task(name, total=None, done=0, simulated="0 s", speed="")
            update = _progress(bar, task)
            file = run_folder(folder, f".{name}.decisions.jsonl") if decisions else None
            if file is not None:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                record = run_one(
                    settings, name, trace, trace_sha256=sha256, command=command, progress=update, decisions=file
                )
                if interrupt.asked and not record.requests["request_id"]:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:  # before anything happened in this run
                if not records:
                    raise
                interrupt.asked = True
                break
            except Exception:
                bar.remove_task(task)  # all that is said of it is why it failed
                if not bar.tasks:  # nor does an empty line stand for nothing
                    bar.live.transient = bar.disable = True
                    bar.live.stop()
                raise
            update(
                record.meta["totals"].get("simulated_s", record.meta["totals"].get("wall_s")),
                record.meta["totals"]["ended"],
                record.meta["totals"]["iterations"],
            )
            bar.update(task, total=1, completed=1)
            records[name] = record
            writing = writer.submit(
                write_record, record, run_folder(folder, name), {"decisions.jsonl": file} if file is not None else None
            )
            if interrupt.asked:
                break
    assert writing is not None
    return records, interrupt.asked, writing


def _progress(bar: Any, task: Any) -> Any:
    import time

    began = time.monotonic()

    def update(simulated_s: float, done: int, iterations: int) -> None:
        wall_s = max(time.monotonic() - began, 1e-9)
        speed = f"{simulated_s / wall_s:,.0f}x real time, {iterations / wall_s:,.0f} its/s"
        bar.update(task, done=done, simulated=f"{simulated_s:,.1f} s", speed=speed)

    return update


def _write_page(records: dict[str, RunRecord], folder: Path, settings: RunSettings) -> Report:
    from reports.page.report_page import write_report

    first = next(iter(records.values()))
    title = f"{first.meta['trace']['name']}: {first.meta['model']} on {first.meta['hardware']['gpu']}"
    page = folder / PAGE_FILE
    return write_report(records, page, title, first.meta["command"], settings.slo_ttft, settings.slo_tpot)


def _print(made: Report, folder: Path, as_json: bool, by_seed: Sequence[Summaries]) -> None:
    from reports.compare.differing_settings import notes
    from reports.exports.runs_json import to_json
    from reports.metrics.cuts import cut_lines
    from reports.metrics.how_sure import accuracy_lines, difference_lines, range_rows
    from reports.metrics.labels import front_end_label, weights_label
    from reports.metrics.pool_use import pool_lines
    from reports.metrics.seeds import seed_lines
    from reports.terminal.full_table import comparison_table
    from reports.verdict.verdict import verdict

    records, page = made.records, folder / PAGE_FILE
    if as_json:
        print(
            to_json(
                made.summaries, {name: run_folder(folder, name) for name in records}, page, made.uses, records, by_seed
            )
        )
        return
    from rich.console import Console

    console = Console()
    console.print(comparison_table(made.summaries, range_rows(made.records, made.summaries)))
    for line in verdict(made.summaries, made.uses, made.records):
        console.print(line, highlight=False)
    for name, record in records.items():
        for line in pool_lines(name, record):
            console.print(line, highlight=False)
    for label in dict.fromkeys(weights_label(record.meta) for record in records.values()):
        if label:
            console.print(f"weights: {label}", highlight=False, style="dim")
    for label in dict.fromkeys(front_end_label(record.meta) for record in records.values()):
        if label:
            console.print(f"latencies: {label}", highlight=False, style="dim")
    for line in seed_lines(by_seed, made.baseline) if by_seed else ():
        console.print(line, highlight=False)
    for line in (*difference_lines(made.summaries, records, made.baseline), *accuracy_lines(records)):
        console.print(line, highlight=False, style="dim")
    for note in (*notes(records), *cut_lines(records)):
        console.print(f"note: {note}", highlight=False, style="dim")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def say(notes: Sequence[str]) -> None:
    """Notes on what was asked for, where they disturb no output."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def free_folder(folder: Path) -> Path:
    """``folder``, or with the first number that makes it new."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _clear_leftovers(folder: Path, new: Sequence[Path]) -> None:
    """After a failure: no half-written file, and no folder that holds nothing, nor those above it that were made for it:
    ``new``, the innermost first."""
    for file in folder.glob(".*.decisions.jsonl"):
        file.unlink()
    for empty in dict.fromkeys([folder, *new]):
        if not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()
