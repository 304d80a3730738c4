"""``workbench sweep``: a trace under many settings, side by side, resumable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given
from workbench.cli.trace_flags import TraceFlags, TraceReading, words_of

if TYPE_CHECKING:
    from workbench.search.objectives import Objective
    from workbench.search.point import Base, Shared
    from workbench.search.results import Results
    from workbench.search.space import Dimension

_SEARCH, _RUN = "Search", "Run"
DEFAULT_OBJECTIVES = "output_throughput_per_gpu,ttft_p99_s"

_option = partial(options.option, panel=_SEARCH)
Command = command_with(SettingFlags(RUN_SETTINGS), TraceFlags())


def sweep(
    ctx: typer.Context,
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    vary: Annotated[
        Optional[list[str]],
        _option(
            "--vary",
            help="Setting and values: key=v1,v2 or, for numbers, key=low..high, with /steps for a grid and :log. Repeat for more.",
        ),
    ] = None,
    search: Annotated[str, _option("--search", help="grid | random | optuna. Default grid.")] = "grid",
    points: Annotated[
        Optional[int], _option("--points", help="Runs of a random or Optuna search (default 32); most a grid may have.")
    ] = None,
    objective: Annotated[
        str,
        _option(
            "--objective",
            help=f"What is best: metrics, comma-separated, max: or min: before one where needed. Default {DEFAULT_OBJECTIVES}.",
        ),
    ] = DEFAULT_OBJECTIVES,
    prices: Annotated[
        Optional[Path], _option("--prices", help="TOML table of what a GPU costs an hour; adds cost.")
    ] = None,
    jobs: Annotated[
        Optional[int], _option("--jobs", help="Runs at a time. Default: the CPUs there are.", panel=_RUN)
    ] = None,
    executor: options.Executor = "local",
    time_limit: Annotated[
        Optional[float],
        _option(
            "--time-limit",
            help="Seconds of wall time after which a run is stopped and recorded as timed out.",
            panel=_RUN,
        ),
    ] = None,
    out: Annotated[
        Optional[Path], _option("--out", help="Output folder. Default: runs/<trace>-sweep.", panel=_RUN)
    ] = None,
    resume: Annotated[
        bool,
        _option(
            "--resume", help="Go on with the sweep in the output folder; no finished point is repeated.", panel=_RUN
        ),
    ] = False,
    force: Annotated[
        bool, _option("--force", help="Replace an earlier sweep in the output folder.", panel=_RUN)
    ] = False,
    keep_records: Annotated[
        bool, _option("--keep-records", help="Keep the run record of every point in records/.", panel=_RUN)
    ] = False,
    as_json: Annotated[bool, _option("--json", help="Print the outcome as JSON.", panel=_RUN)] = False,
    config: options.Config = None,
) -> None:
    """Simulate TRACE at many points of a space of settings: one CSV and a page.

    Every flag of a setting sets it for all points.
    """
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(
            trace,
            vary or [],
            search,
            points,
            objective,
            prices,
            jobs,
            executor,
            time_limit,
            out,
            resume,
            force,
            keep_records,
            as_json,
            config,
            given(ctx, "reading"),
            given(ctx, "settings"),
        )


def _run(
    path: Path,
    vary: list[str],
    search: str,
    points: int | None,
    objective: str,
    prices_file: Path | None,
    jobs: int | None,
    executor: str,
    time_limit_s: float | None,
    out: Path | None,
    resume: bool,
    force: bool,
    keep_records: bool,
    as_json: bool,
    config: Path | None,
    reading: TraceReading,
    flags: dict[str, Any],
) -> None:
    from ground.errors import InputError
    from traces.in_memory import in_memory
    from workbench.cli.runs import say
    from workbench.clients.trace_input import open_as
    from workbench.search.executor import check_executor
    from workbench.search.objectives import parse_objectives
    from workbench.search.point import Base, Shared
    from workbench.search.prices import read_prices
    from workbench.search.results import RECORDS, Results
    from workbench.search.sources import Listed, open_source
    from workbench.search.space import parse_vary
    from workbench.search.sweep import check_any, manifest_of, run_sweep

    if resume and force:
        raise InputError("resume: goes on with a sweep that --force would remove; give one of the two")
    space = parse_vary(vary)
    objectives = parse_objectives(objective)
    prices = read_prices(prices_file) if prices_file is not None else None
    base = Base.for_space(config, flags, space)
    say(base.renamed(vary, space))
    check_executor(executor, jobs, time_limit_s)
    # Everything that can be wrong is wrong before a folder is made or the first second is spent.
    asked = open_source(search, space, points, base.seed, objectives, [])
    opened = open_as(path, reading, ordered=_arrivals_count(base, space), seed=base.seed)
    if isinstance(asked, Listed):
        check_any(Shared(base, opened, "", prices), asked.points)
    held = in_memory(opened)
    folder = out if out is not None else Path("runs") / f"{held.info.name}-sweep"
    shared = Shared(
        base, held, held.sha256(), prices, folder / RECORDS if keep_records else None, trace_flags=words_of(reading)
    )
    manifest = manifest_of(shared, space, search, points, objectives)
    with Results(folder, manifest, resume, force) as results:
        done = [(results.point_of(row), row) for row in results.rows]
        source = open_source(search, space, points, base.seed, objectives, done)
        with _progress_bar(quiet=as_json) as progress:
            finished = run_sweep(
                shared, source, results, executor=executor, jobs=jobs, time_limit_s=time_limit_s, progress=progress
            )
        _report(results, shared, space, objectives, as_json)
        nothing = _warn(results.rows)
    if not finished:
        typer.echo(
            f"interrupted: {len(results.rows)} of {source.total} points are in {folder}; --resume goes on", err=True
        )
        raise typer.Exit(130)
    if nothing:
        raise typer.Exit(2)


def _warn(rows: list[dict[str, Any]]) -> bool:
    """Say on stderr which points could not serve every request; whether no point could serve any."""
    from reports.metrics.sweep_metrics import compared
    from workbench.search.point import INCOMPLETE

    lost = [row for row in rows if row["status"] == INCOMPLETE]
    nothing = bool(lost) and not compared(rows)
    if lost:
        points = f"{len(lost)} of {len(rows)} points"
        what = (
            f"no point can serve a request, {points} were tried" if nothing else f"{points} cannot serve every request"
        )
        first = f"point {lost[0]['point']}: {lost[0]['reason']}"
        typer.echo(f"{'error' if nothing else 'warning'}: {what}; first, {first}", err=True)
    return nothing


def _arrivals_count(base: Base, space: list[Dimension]) -> bool:
    """Tell whether any run goes by the arrivals of the trace: not where all have a number of requests at a time."""
    varied = [dimension.values for dimension in space if dimension.name == "concurrency"]
    asked = varied[0] if varied else (base.given().get("concurrency"),)
    return any(value is None for value in asked)


def _progress_bar(quiet: bool) -> Any:
    """A context that gives a callback for the state of the sweep. No thread draws it: processes are forked meanwhile."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def shown() -> Any:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=quiet, auto_refresh=False) as bar:
            task = bar.add_task("", total=None, state="")

            def update(state: Any) -> None:
                counts = ", ".join(f"{number} {status}" for status, number in sorted(state.by_status.items()))
                bar.update(
                    task,
                    total=state.total,
                    completed=state.done,
                    refresh=True,
                    state=f"{state.running} running{', ' if counts else ''}{counts}",
                )

            yield update

    return shown()


def _report(
    results: Results, shared: Shared, space: list[Dimension], objectives: list[Objective], as_json: bool
) -> None:
    from collections import Counter

    from ground.json_file import json_text
    from reports.page.sweep_page import write_sweep_page
    from workbench.search.results import PAGE, RESULTS
    from workbench.search.sweep import best_rows, pareto_front

    names = [dimension.name for dimension in space]
    page = results.folder / PAGE
    front = pareto_front(results.rows, objectives)
    sure = {row["point"]: _sure(shared, results.point_of(row)) for row in front}
    lines = _sure_lines(sure)
    command_of = partial(_command, shared, results)
    write_sweep_page(results.rows, results.manifest, page, command_of, lines)
    counts = dict(Counter(str(row["status"]) for row in results.rows))
    if as_json:
        best = {}
        for objective in objectives:
            ranked = best_rows(results.rows, objective)
            best[objective.metric] = _brief(ranked[0], names, objectives) if ranked else None
        front_rows = [{**_brief(row, names, objectives), **sure[row["point"]]} for row in front]
        print(
            json_text(
                {
                    "points": counts,
                    "best": best,
                    "pareto": front_rows,
                    "notes": results.manifest["trace"]["notes"],
                    "results": str(results.folder / RESULTS),
                    "report": str(page),
                }
            )
        )
        return
    from rich.console import Console

    console = Console()
    console.print(_table(front, names, objectives))
    told = ", ".join(f"{number} {status}" for status, number in counts.items())
    console.print(f"{len(results.rows)} points: {told}", highlight=False)
    for status, reason in _first_reasons(results.rows):
        console.print(f"{status}: {reason}", highlight=False, style="dim", soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False, style="dim")
    for note in results.manifest["trace"]["notes"]:
        console.print(f"note: {note}", highlight=False, style="dim")
    console.print(f"results: {results.folder / RESULTS}", highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _command(shared: Shared, results: Results, row: Mapping[str, Any]) -> str:
    return shared.command_for(results.point_of(dict(row)))


def _sure(shared: Shared, point: dict[str, Any]) -> dict[str, Any]:
    """How sure the numbers of a point are, as a record of its run has it."""
    from workbench.cluster.pools import resolve_pools
    from workbench.search.sureness import sure_parts

    return sure_parts(resolve_pools(*shared.base.settings(point)))


def _sure_lines(sure: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """How sure the points of a Pareto front are, each sentence once, with the points that it is of where that is not all."""
    from reports.metrics.how_sure import each_once, sure_lines

    return each_once(
        {str(point): sure_lines(said) for point, said in sure.items()},
        lambda points: f"point{'s' * (len(points) > 1)} {', '.join(points)}",
    )


def _brief(row: dict[str, Any], names: list[str], objectives: list[Objective]) -> dict[str, Any]:
    kept = ("point", *names, "gpus", *(objective.metric for objective in objectives))
    return {name: row[name] for name in kept}


def _table(front: list[dict[str, Any]], names: list[str], objectives: list[Objective]) -> Any:
    from rich.table import Table

    from reports.metrics.labels import written
    from reports.metrics.sweep_metrics import SWEEP_METRICS

    what = "Pareto front: no other point is better in all of these" if len(objectives) > 1 else "Best point"
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold",
        pad_edge=False,
        title=what,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("point", justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    metrics = [SWEEP_METRICS[objective.metric] for objective in objectives]
    for metric in metrics:
        table.add_column(metric.label, justify="right", overflow="fold")
    texts = [written([row[metric.name] for row in front], metric.unit) for metric in metrics]
    for place, row in enumerate(front):
        settings = ["none" if row[name] is None else str(row[name]) for name in names]
        table.add_row(str(row["point"]), *settings, *(column[place] for column in texts))
    return table


def _first_reasons(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every status other than finished with a reason, and how many more there are."""
    from workbench.search.point import FINISHED

    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != FINISHED:
            reasons.setdefault(str(row["status"]), []).append(f"point {row['point']}: {row['reason']}")
    return [
        (status, all_[0] + (f" (and {len(all_) - 1} more)" if all_[1:] else "")) for status, all_ in reasons.items()
    ]
