"""``workbench plan``: the highest rate within an SLO, and the cheapest configuration that carries a load."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given
from workbench.cli.trace_flags import TraceFlags, TraceReading, words_of

if TYPE_CHECKING:
    from workbench.search.candidate import Candidate, Load
    from workbench.search.point import Shared
    from workbench.search.slo import Limit

_PLAN, _RUN = "Plan", "Run"

_option = partial(options.option, panel=_PLAN)
Command = command_with(SettingFlags(RUN_SETTINGS), TraceFlags())


def plan(
    ctx: typer.Context,
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    slo: Annotated[
        Optional[str],
        _option(
            "--slo",
            help="What must be kept: ttft_p99=2s,tpot_p99=50ms. Latencies ttft, tpot, itl, e2e, queue; mean or any percentile.",
        ),
    ] = None,
    vary: Annotated[
        Optional[list[str]],
        _option(
            "--vary", help="Settings to choose from: key=v1,v2 or key=low..high with /steps and :log. Repeat for more."
        ),
    ] = None,
    prices: Annotated[
        Optional[Path],
        _option("--prices", help="TOML table of what a GPU costs an hour. Without it the fewest GPUs win."),
    ] = None,
    rate: Annotated[
        Optional[float], _option("--rate", help="Arrivals/s to carry. Default: the trace's own rate.")
    ] = None,
    both_in_one: Annotated[
        bool,
        _option(
            "--both-in-one/--no-both-in-one",
            help="Beside pools that prefill and decode, search instances that do both, of the same kinds. Default: yes.",
        ),
    ] = True,
    jobs: Annotated[
        Optional[int], _option("--jobs", help="Configurations at a time. Default: the CPUs there are.", panel=_RUN)
    ] = None,
    executor: options.Executor = "local",
    time_limit: Annotated[
        Optional[float],
        _option(
            "--time-limit",
            help="Seconds of wall time after which the search of one configuration is given up.",
            panel=_RUN,
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        _option("--out", help="Folder for plan.json and plan.html. Default: none are written.", panel=_RUN),
    ] = None,
    force: Annotated[
        bool, _option("--force", help="Replace an earlier plan in the output folder.", panel=_RUN)
    ] = False,
    as_json: Annotated[bool, _option("--json", help="Print the plan as JSON.", panel=_RUN)] = False,
    config: options.Config = None,
) -> None:
    """Find the highest rate at which TRACE keeps an SLO; over a space of settings, the cheapest that carries the load."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(
            trace,
            slo,
            vary or [],
            prices,
            rate,
            both_in_one,
            jobs,
            executor,
            time_limit,
            out,
            force,
            as_json,
            config,
            given(ctx, "reading"),
            given(ctx, "settings"),
        )


def _run(
    path: Path,
    slo: str | None,
    vary: list[str],
    prices_file: Path | None,
    rate: float | None,
    both_in_one: bool,
    jobs: int | None,
    executor: str,
    time_limit_s: float | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    config: Path | None,
    reading: TraceReading,
    flags: dict[str, Any],
) -> None:
    from traces.in_memory import in_memory
    from workbench.cli.runs import say
    from workbench.clients.trace_input import open_as
    from workbench.search.both_in_one import both_points
    from workbench.search.executor import check_executor
    from workbench.search.plan import measure_load, own_name, prepare_plan_folder, run_plan
    from workbench.search.point import Base, Shared
    from workbench.search.prices import read_prices
    from workbench.search.slo import parse_slo
    from workbench.search.space import SpaceError, grid_points, parse_vary
    from workbench.search.sweep import check_any

    if slo is None:
        raise SpaceError("slo: say what must be kept, such as --slo ttft_p99=2s,tpot_p99=50ms")
    limits = parse_slo(slo)
    space = parse_vary(vary) if vary else []
    for dimension in space:
        if dimension.name in ("rate", "speedup", "concurrency"):
            raise SpaceError(f"{dimension.name}: cannot be varied here: plan looks for the highest rate itself")
    prices = read_prices(prices_file) if prices_file is not None else None
    base = Base.for_space(config, flags, space)
    if base.given().get("autoscale"):
        raise SpaceError("autoscale: plan looks for how many instances it takes; simulate and sweep take it")
    say(base.renamed(vary, space))
    points = list(grid_points(space))
    check_executor(executor, jobs, time_limit_s)
    opened = open_as(path, reading, seed=base.seed)
    check_any(Shared(base, opened, "", prices), points)
    shared = Shared(base, (held := in_memory(opened)), held.sha256(), prices, trace_flags=words_of(reading))
    load = measure_load(shared, points, rate)
    if both_in_one:
        points += both_points(shared, points)
    if out is not None:
        prepare_plan_folder(out, force)
    try:
        with _progress_bar(len(points), quiet=as_json) as progress:
            candidates = run_plan(
                shared, points, limits, load, executor=executor, jobs=jobs, time_limit_s=time_limit_s, progress=progress
            )
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(130) from None
    names = [dimension.name for dimension in space]
    if any(candidate.pools for candidate in candidates):
        names = ["pools", *filter(own_name, names)]
    _report(candidates, limits, load, shared, names, out, as_json)
    _warn(candidates)


def _warn(candidates: list[Candidate]) -> None:
    """Say on stderr what can never be served. Raises typer.Exit with 2 when that is everything."""
    from workbench.search.point import INCOMPLETE

    lost = [c for c in candidates if c.status == INCOMPLETE or (c.found is not None and c.found.refused is not None)]
    if not lost:
        return
    nothing = all(candidate.found is None for candidate in candidates)
    # What the best cannot serve either is what the plan leaves out.
    first = lost[0]
    sentence = first.found.refused.sentence if first.found is not None and first.found.refused else first.reason
    more = f" (and likewise {len(lost) - 1} more configurations)" if lost[1:] else ""
    typer.echo(f"{'error' if nothing else 'warning'}: {sentence}{more}", err=True)
    if nothing:
        raise typer.Exit(2)


def _progress_bar(total: int, quiet: bool) -> Any:
    """A context that gives a callback. No thread draws it: processes are forked meanwhile."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def shown() -> Any:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("configurations, {task.fields[now]} searched now"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=quiet, auto_refresh=False) as bar:
            task = bar.add_task("", total=total, now=0)

            def update(done: int, running: int) -> None:
                bar.update(task, completed=done, now=running, refresh=True)

            yield update

    return shown()


def _report(
    candidates: list[Candidate],
    limits: list[Limit],
    load: Load,
    shared: Shared,
    names: list[str],
    out: Path | None,
    as_json: bool,
) -> None:
    from ground.json_file import json_text
    from workbench.search.plan import answer, result, write_plan

    currency = shared.prices.currency if shared.prices is not None else ""
    found = result(candidates, limits, load, shared)
    page = None
    if out is not None:
        page = write_plan(found, names, out)
    if as_json:
        print(json_text({**found, "report": str(page) if page is not None else None}))
        return
    from rich.console import Console

    console = Console()
    if len(candidates) > 1:
        console.print(_table(candidates, limits, load, names, currency))
    for line in answer(candidates, limits, load, currency):
        console.print(line, highlight=False)
    for each in found["deploy"]:
        whose = f"pool {each['pool']} " if "pool" in each else ""
        command = each["command"] or "there is no command for it"
        console.print(f"deploy {whose}with {each['engine']}: {command}", highlight=False, markup=False, soft_wrap=True)
        if each["without"]:
            console.print(
                f"  no flag there for {'; '.join(each['without'])}", highlight=False, markup=False, style="dim"
            )
    for line in found["rests_on"]:
        console.print(line, highlight=False, style="dim")
    for note in (*found["notes"], *found["trace"]["notes"]):
        console.print(f"note: {note}", highlight=False, style="dim")
    if page is not None:
        console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _table(candidates: list[Candidate], limits: list[Limit], load: Load, names: list[str], currency: str) -> Any:
    import math

    from rich.table import Table

    from reports.metrics.labels import Unit, written

    priced = any(candidate.cost_per_hour is not None for candidate in candidates)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for title in (
        "GPUs",
        *([f"{currency}/h".lstrip("/") if currency else "cost/h"] if priced else []),
        "rate/s",
        "margin",
    ):
        table.add_column(title, justify="right")
    for limit in limits:
        table.add_column(limit.name, justify="right", overflow="fold")
    for candidate in candidates:
        point = {**candidate.point, "pools": " ".join(candidate.pools)}
        cells = ["none" if point[name] is None else str(point[name]) for name in names]
        found = candidate.found
        if found is None:
            table.add_row(*cells, "-", *(["-"] if priced else []), candidate.status, style="dim")
            continue
        cells.append(str(candidate.gpus))
        if priced:
            cells.append(f"{candidate.cost_per_hour:,.2f}")
        cells.append("any" if math.isinf(found.rate) else f"{found.rate:.4g}" if found.rate else "none")
        cells.append("" if math.isinf(found.rate) else f"{candidate.margin(load.target):+.0%}")
        measured = found.at_rate.measured_s if found.at_rate is not None else {}
        cells += [written([measured.get(limit.name)], Unit.SECONDS)[0] for limit in limits]
        table.add_row(
            *cells,
            style="bold green"
            if candidate is candidates[0] and candidate.carries
            else ""
            if candidate.carries
            else "dim",
        )
    return table
