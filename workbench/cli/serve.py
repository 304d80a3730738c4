"""``workbench serve``: a model behind an HTTP API, under the scheduler and loops that ``simulate`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given
from workbench.cli.options import option
from workbench.scheduler.settings import RUN

NOT_OF_A_SERVER = {"model", "engine", "dp", "pool", "router"}
"""Settings of what one server has not, beside those that do nothing there: instances behind a router; and its argument."""
Command = command_with(
    SettingFlags("workbench.serving.serve_settings:ServeSettings", name="server"),
    SettingFlags(RUN_SETTINGS, without=NOT_OF_A_SERVER, idle=("live", "served")),
)


def serve(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, GGUF file or id; simulated: also any model of the catalogue.", show_default=False
        ),
    ],
    force: Annotated[bool, option("--force", help="Replace an earlier run in the record's folder.", panel=RUN)] = False,
    config: options.Config = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP API."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        code = _run(config, {**given(ctx, "settings"), "model": model}, given(ctx, "server"), force)
    raise typer.Exit(code)


def _run(config: Path | None, flags: dict[str, Any], server: dict[str, Any], force: bool) -> int:
    from workbench.cli.runs import command_line, say
    from workbench.scheduler.config import ConfigError
    from workbench.settings.idle import check_effects
    from workbench.settings.loading import settings_from
    from workbench.settings.real import live_notes, without_idle

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
    run = settings_from(config, flags, defaults=backend.defaults())
    say(check_effects(run, flags, config))
    settings = ServeSettings(without_idle(run, "live", "served"), command=command_line(), **server)
    say(backend.check(settings.run, settings.loop))  # before anything is loaded
    return run_server(settings, force)
