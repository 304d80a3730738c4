"""``workbench route``: a router of HTTP in front of servers, which chooses as the simulator's does."""

from __future__ import annotations

import typer

from workbench.cli.flags import RUN_SETTINGS, SettingFlags, command_with, given

Command = command_with(
    SettingFlags("workbench.routing.route_settings:RouteSettings", name="route"),
    SettingFlags(RUN_SETTINGS, only=("router", "decode_router"), name="kinds"),
)


def route(ctx: typer.Context) -> None:
    """Route requests to OpenAI-compatible servers, or to pairs of prefill and decode servers of ours."""
    from workbench.cli.errors import one_line_errors
    from workbench.scheduler.settings import ConfigError, settings_of

    with one_line_errors():
        try:
            from workbench.routing.route_settings import RouteSettings
            from workbench.routing.run_router import route as run
        except ModuleNotFoundError as error:
            raise ConfigError(f"routing needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
        declared = settings_of(RouteSettings)
        said = {name: declared[name].meant(v) for name, v in given(ctx, "route").items() if v is not None}
        kinds = {name: value for name, value in given(ctx, "kinds").items() if value is not None}
        code = run(RouteSettings(**said, **kinds))
    raise typer.Exit(code)
