"""``workbench replay``: a trace on a real model runner, arrivals honoured, to the same record as a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, RUNNER_FLAGS, SettingFlags, command_with, given, load_format
from workbench.cli.trace_flags import TraceFlags, TraceReading

if TYPE_CHECKING:
    from reports.record.run_record import RunRecord
    from traces import Trace
    from workbench.settings.run_settings import RunSettings


SIMULATED_ONLY = {"dp", "pool", "ep", "router"}
"""Settings of what a real run has not, beside those that do nothing there: instances behind a router."""
Command = command_with(
    RUNNER_FLAGS, SettingFlags(RUN_SETTINGS, without=SIMULATED_ONLY, idle=("real", "live", "replayed")), TraceFlags()
)


def replay(
    ctx: typer.Context,
    trace: Annotated[
        Path, typer.Argument(help="Trace file: any known format, plain, gzip or zstd.", show_default=False)
    ],
    out: options.Out = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    decisions: options.Decisions = False,
    config: options.Config = None,
    backend: options.Backend = "auto",
) -> None:
    """Run TRACE in real time on a real model, under the same scheduler and loops as `simulate`."""
    from workbench.cli.errors import one_line_errors

    reading, settings = given(ctx, "reading"), given(ctx, "settings")
    with one_line_errors():
        _run(trace, out, force, as_json, decisions, config, reading, backend, load_format(ctx), settings)


def _run(
    path: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    decisions: bool,
    config: Path | None,
    reading: TraceReading,
    backend: str,
    load_format: str,
    flags: dict[str, Any],
) -> None:
    from workbench.cli.runs import open_reshaped, run_and_report, say
    from workbench.cli.waits import SaidWaits
    from workbench.scheduler.config import ConfigError
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from

    try:
        from workbench.cluster.device import choose_device, hardware_on, runner_options
        from workbench.cluster.replay import replay_loop
        from workbench.settings.real import check_device_effects, device_defaults, live_notes, preset_notes

        device = choose_device(backend)
        say([*check_device_effects(flags, config, device), *live_notes(config, "live", "replayed")])
        settings = settings_from(config, flags, defaults=device_defaults(device), hardware=hardware_on(device))
        say(check_effects(settings, flags, config))
        say([*dict.fromkeys(note for name in settings.loops for note in preset_notes(settings, name))])
        for name in settings.loops:
            runner_options(settings, name, device, load_format)
    except ModuleNotFoundError as error:
        raise ConfigError(f"a real run needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    trace = open_reshaped(path, reading, settings)

    def run_one(settings: RunSettings, loop: str, trace: Trace, **more: Any) -> RunRecord:
        return replay_loop(settings, loop, trace, device=device, load_format=load_format, waiting=SaidWaits(), **more)

    run_and_report(trace, settings, out, force, as_json, decisions, run_one, "replayed")
