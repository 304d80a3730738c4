"""``workbench serve``: a model behind an HTTP API, under the scheduler and loops that ``simulate`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given
from workbench.cli.options import option
from workbench.scheduler.settings import RUN
from workbench.settings.one_server import NOT_OF_A_SERVER

if TYPE_CHECKING:
    from workbench.settings.run_settings import RunSettings

Command = command_with(
    SettingFlags("workbench.serving.serve_settings:ServeSettings", name="server"),
    SettingFlags(RUN_SETTINGS, without=NOT_OF_A_SERVER, idle=("live", "served")),
)


def serve(
    ctx: typer.Context,
    model: Annotated[
        Optional[str],
        typer.Argument(
            help="Hugging Face folder, GGUF file or id; simulated: also any model of the catalogue. With --like: the record's.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, option("--force", help="Replace an earlier run in the record's folder.", panel=RUN)] = False,
    like: options.Like = None,
    config: options.Config = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        code = _run(config, {**given(ctx, "settings"), "model": model}, given(ctx, "server"), force, like)
    raise typer.Exit(code)


def _run(
    config: Path | None, flags: dict[str, Any], server: dict[str, Any], force: bool, like: Path | None = None
) -> int:
    from workbench.cli.errors import exit_code_of
    from workbench.cli.runs import command_line, say
    from workbench.roles import check_role
    from workbench.scheduler.config import ConfigError
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from
    from workbench.settings.real import live_notes, preset_notes, without_idle

    if like is None and flags["model"] is None:
        raise ConfigError("model: say which, or --like RECORD, which has one")
    server = {name: value for name, value in server.items() if value is not None}
    try:
        from workbench.serving.backends.backend_spec import BACKEND_SETTINGS, backend_spec
        from workbench.serving.serve_settings import ServeSettings
        from workbench.serving.supervisor import serve as run_server

        asked = {name: server[name] for name in BACKEND_SETTINGS if name in server}
        backend = backend_spec(**asked).here()
        server["backend"] = backend.name
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    if force and "record" not in server:
        raise ConfigError("force: there is no --record whose folder could be replaced")
    say([*backend.check_flags(flags, config), *live_notes(config, "live", "served")])
    run = settings_from(config, flags, like, backend.defaults(), backend.hardware())
    if not run.pool:
        run = run.as_role(check_role(server.get("role", "both")))
    say(check_effects(run, flags, config))
    say(_of_record(run) if like is not None else [])
    run = without_idle(run, "live", "served")
    if run.pool or run.dp > 1:
        from workbench.fleet.launcher import run_fleet
        from workbench.fleet.planned import FleetSettings

        fleet = FleetSettings(run, server, command_line())
        for pool in run.pools(fleet.loop):
            say(preset_notes(pool.settings, pool.loop, simulated=not backend.has_weights))
        say(backend.check(run, fleet.loop))
        return run_fleet(fleet, force, exit_code_of, gpus=backend.on_gpus)
    settings = ServeSettings(run, command=command_line(), **server)
    if settings.admin_key is not None:  # perhaps of the router's own environment
        say(["admin_key: has no effect here: one server has no /workers"])
    say(preset_notes(settings.run, settings.loop, simulated=not backend.has_weights))
    say(settings.spec.check(settings.run, settings.loop))  # before anything is loaded
    return run_server(settings, force)


def _of_record(run: RunSettings) -> list[str]:
    """Notes on what the instances of a record did, and those of a server do not."""
    from workbench.settings.loading import SETTINGS

    given = {"fail": run.fail, "autoscale": run.autoscale}
    return [
        f"{name}: {SETTINGS[name].idle['live']}: as many as there were at the beginning"
        for name in given
        if given[name]
    ]
