"""``workbench`` and its commands."""

from __future__ import annotations

import typer

from workbench.cli import (
    calibrate,
    catalogue,
    compare,
    import_,
    observe,
    plan,
    profile,
    replay,
    report,
    route,
    serve,
    simulate,
    sweep,
    trace,
)

app = typer.Typer(
    name="workbench",
    help="Simulate and compare event loops, batching policies and layouts for LLM serving.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("simulate", cls=simulate.Command)(simulate.simulate)
app.command("replay", cls=replay.Command)(replay.replay)
app.command("observe", cls=observe.Command)(observe.observe)
app.command("serve", cls=serve.Command)(serve.serve)
app.command("route", cls=route.Command)(route.route)
app.command("sweep", cls=sweep.Command)(sweep.sweep)
app.command("plan", cls=plan.Command)(plan.plan)
app.command("report")(report.report)
app.command("diff-config")(report.diff_config)
app.command("compare", cls=compare.Command)(compare.compare)
app.command("import")(import_.import_run)
app.command("calibrate", cls=calibrate.Command)(calibrate.calibrate)
app.command("catalogue")(catalogue.catalogue)
app.add_typer(profile.app, name="profile")
app.add_typer(trace.app, name="trace")


@app.callback()
def _root() -> None:
    """Keep `workbench` a group of commands."""
