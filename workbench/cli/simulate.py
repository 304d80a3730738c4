"""``workbench simulate``: a trace under one or several loops on a modelled GPU, compared."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given
from workbench.cli.trace_flags import TraceFlags, TraceReading
from workbench.scheduler.settings import RUN

if TYPE_CHECKING:
    from reports.metrics.labels import Summaries
    from reports.record.run_record import RunRecord
    from traces import Trace
    from workbench.settings.run_settings import RunSettings


Command = command_with(SettingFlags(RUN_SETTINGS), TraceFlags())


def simulate(
    ctx: typer.Context,
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    out: options.Out = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    decisions: options.Decisions = False,
    repeat: Annotated[
        int,
        options.option(
            "--repeat",
            help="Run under N seeds, from --seed on, and say between what the numbers lie; records are of the first. "
            "Default 1.",
            panel=RUN,
        ),
    ] = 1,
    prices: options.Prices = None,
    like: options.Like = None,
    config: options.Config = None,
) -> None:
    """Replay TRACE under the event loops on a modelled GPU and compare them."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        _run(
            trace,
            out,
            force,
            as_json,
            decisions,
            repeat,
            prices,
            like,
            config,
            given(ctx, "reading"),
            given(ctx, "settings"),
        )


def _run(
    path: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    decisions: bool,
    repeat: int,
    prices_file: Path | None,
    like: Path | None,
    config: Path | None,
    reading: TraceReading,
    flags: dict[str, Any],
) -> None:
    from ground.errors import InputError
    from reports.metrics.summary import summarise
    from workbench.cli.runs import open_reshaped, run_and_report, say
    from workbench.cluster.pools import gpus_of, renamed_in_gpus, resolve_pools
    from workbench.cluster.simulate import simulate_loop
    from workbench.search.prices import kept_with, read_prices
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from

    if repeat < 1:
        raise InputError(f"repeat: {repeat} is less than 1")
    settings = settings_from(config, flags, like)
    in_files = renamed_in_gpus(pool.settings.gpu for pool in settings.pools(settings.loops[0]))
    say([*check_effects(settings, flags, config), *in_files, *_better_times(settings, flags)])
    pools = {}
    for name in settings.loops:
        # Everything that can be wrong is wrong before the first second is spent.
        pools[name] = resolve_pools(settings, name)
    prices = None
    if prices_file is not None:
        prices = kept_with(read_prices(prices_file), {gpu: None for each in pools.values() for gpu in gpus_of(each)})
    trace = open_reshaped(path, reading, settings)

    def run_one(settings: RunSettings, loop: str, trace: Trace, **more: Any) -> RunRecord:
        return simulate_loop(settings, loop, trace, pools=pools[loop], prices=prices, **more)

    def under(seed: int) -> Summaries:
        own = dataclasses.replace(settings, seed=seed)
        shaped = open_reshaped(path, reading, own)
        return {
            loop: summarise(simulate_loop(own, loop, shaped, trace_sha256="", command=""), own.slo_ttft, own.slo_tpot)
            for loop in own.loops
        }

    again = [partial(under, settings.seed + more) for more in range(1, repeat)]
    run_and_report(trace, settings, out, force, as_json, decisions, run_one, "simulated", again)


def _better_times(settings: RunSettings, flags: dict[str, Any]) -> list[str]:
    """Say how to have measured times, where they are here and nothing was said of costs."""
    from backends.simulated.cost.tables.published_package import at_hand

    if flags.get("cost") is not None:
        return []
    of = {
        (pool.settings.gpu, pool.settings.engine)
        for pool in settings.pools(settings.loops[0])
        if pool.settings.cost == "roofline"
    }
    return [
        f"times are the roofline's estimates; operators of {engine.partition('-')[0]} measured on {gpu} are here: --cost "
        "measured"
        for gpu, engine in sorted(of)
        if at_hand(gpu, engine)
    ]
