"""``workbench calibrate``: cost models from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.calibrate_front_end import calibrate_front_end
from workbench.cli.flags import RUN_SETTINGS, RUNNER_FLAGS, SettingFlags, command_with, given, load_format
from workbench.cli.measuring import measuring

MEASURED = (
    "tp",
    "dtype",
    "mem_fraction",
    "kv_tokens",
    "max_context",
    "cuda_graphs",
    "page_size",
    "max_running",
    "chunk",
)
"""Settings of the runner that is measured."""
Command = command_with(RUNNER_FLAGS, SettingFlags(RUN_SETTINGS, only=MEASURED))


def calibrate(
    ctx: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Folder to write, for --cost profile:FOLDER; or NAME.json, for --cost fitted:NAME.json; with --links or "
            "--front-end NAME.toml.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Optional[str],
        typer.Argument(
            help="Model to measure on this machine: Hugging Face folder, GGUF file or id.", show_default=False
        ),
    ] = None,
    record: Annotated[
        Optional[Path],
        typer.Option(
            "--from",
            help="Instead of measuring: a run record, or a folder of measured points, to fit.",
            show_default=False,
        ),
    ] = None,
    links: Annotated[
        bool,
        typer.Option(
            "--links", help="Instead: measure the link between ranks on this machine; OUT is a file for --machine."
        ),
    ] = False,
    front_end: Annotated[
        bool,
        typer.Option(
            "--front-end",
            help="Instead: measure what HTTP, tokenizer and detokenizer of our server take on this machine; needs no model; "
            "OUT is a file for simulate --front-end.",
        ),
    ] = False,
    tokenizer: Annotated[
        Optional[str],
        typer.Option(
            "--tokenizer",
            help="With --front-end: folder or id of the tokenizer. Default: one that takes bytes.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        Optional[int],
        typer.Option(
            "--ranks", min=2, help="With --links: how many. Default: 2 on a CPU, else all GPUs.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, and measure everything anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    backend: options.Backend = "auto",
) -> None:
    """Measure our runner on this machine: its operators and its CPU phases, as a profile; or, as NAME.json, costs fitted to
    whole steps, which need fewer measurements and can be had from any run record; or, with --links, the link between ranks;
    or, with --front-end, what is between clients and the scheduler.

    Measuring a model can be stopped and started again: what is there, in OUT.points, is not measured twice.
    """
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        settings = {**given(ctx, "settings"), "model": model}
        of_model = {**settings, "from": record, **given(ctx, RUNNER_FLAGS.name)}
        if links or ranks is not None:
            beside = {"front_end": front_end or None, "tokenizer": tokenizer}
            _check_alone("links", links, "ranks", {**beside, **of_model})
            _links(out, force, as_json, backend, ranks)
        elif front_end or tokenizer is not None:
            beside = {"backend": None if backend == "auto" else backend}
            _check_alone("front_end", front_end, "tokenizer", {**of_model, **beside})
            calibrate_front_end(out, force, as_json, tokenizer)
        else:
            _calibrate(record, out, force, as_json, backend, load_format(ctx), settings)


def _check_alone(mode: str, asked: bool, own: str, beside: dict[str, Any]) -> None:
    """Raise ConfigError for what goes with no measurement of the machine alone, and for what only ``mode`` has."""
    from workbench.scheduler.config import ConfigError

    if not asked:
        raise ConfigError(f"{own}: goes with --{mode.replace('_', '-')} alone")
    for name, value in beside.items():
        if value is not None:
            said = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{mode}: measured alone, without {said}")


def _links(out: Path, force: bool, as_json: bool, backend: str, ranks: int | None) -> None:
    from ground.json_file import json_text
    from workbench.scheduler.config import ConfigError

    if out.suffix != ".toml":
        raise ConfigError(f"out: {out}: the link is kept in a machine's file; --out NAME.toml")
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists; --force replaces it")
    try:
        import torch

        from backends.torch.link_times import all_reduce_times
        from workbench.calibrate.doubts import waiting_share
        from workbench.calibrate.link_fit import fit_link, write_machine
        from workbench.cluster.device import choose_device

        device = choose_device(backend)
    except ModuleNotFoundError as error:
        raise ConfigError(f"measuring needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    there = torch.cuda.device_count() if device == "cuda" else None
    count = ranks or there or 2
    if there is not None and not 2 <= count <= there:
        raise ConfigError(f"ranks: {count} on a machine with {there} GPUs; there must be at least two")
    try:
        fit = fit_link(count, all_reduce_times(count, device))
    except RuntimeError as error:
        raise ConfigError(f"links: {error}") from error
    write_machine(out, fit, count, device)
    busy = waiting_share()
    if as_json:
        found = {"bandwidth_bytes_per_s": fit.link.bandwidth, "latency_s": fit.link.latency_s, "ranks": count}
        times = [{"bytes": size, "seconds": seconds} for size, seconds in fit.measured]
        print(json_text({**found, "device": device, "mean_error": fit.mean_error, "all_reduces": times}))
        return
    from rich.console import Console

    console = Console()
    console.print(
        f"{count} ranks on {device}: {fit.link}, off by {fit.mean_error:.1%} on average over "
        f"{fit.measured[0][0]:,} to {fit.measured[-1][0]:,} bytes",
        soft_wrap=True,
    )
    _doubts(console, busy, fit.mean_error)
    console.print(f"simulate with: --machine {out}", soft_wrap=True)


def _calibrate(
    folder: Path | None, out: Path, force: bool, as_json: bool, backend: str, load_format: str, flags: dict[str, Any]
) -> None:
    from backends.simulated.cost.tables.own_profile import is_own
    from ground.json_file import json_text
    from reports.record.run_record import RecordError, read_record
    from workbench.calibrate.doubts import waiting_share
    from workbench.calibrate.fit import fit_record
    from workbench.calibrate.measure import wants_file
    from workbench.calibrate.operator_profile import write_operators
    from workbench.calibrate.points import fit_points, is_points

    if (folder is None) == (flags["model"] is None):
        raise RecordError("say what: a MODEL to measure or --from FOLDER to fit; or --links, or --front-end")
    if out.exists() and not force:
        raise RecordError(f"{out}: exists; --force replaces it")
    if out.is_dir() and (wants_file(out) or not is_own(out)):
        raise RecordError(f"{out}: a folder that is no profile; nothing replaces it")
    busy = None
    if folder is not None and is_points(folder):
        found = (fit_points if wants_file(out) else write_operators)(folder, out)
    elif folder is not None:
        if not wants_file(out):
            raise RecordError(f"out: {out}: whole steps are fitted to a record; --out NAME.json")
        found = fit_record(read_record(folder), folder, out)
    else:
        found = _measure(out, force, as_json, backend, load_format, flags)
        busy = waiting_share()
    if as_json:
        print(json_text(found))
        return
    from rich.console import Console

    console = Console()
    if "stages" in found:
        _stages(console, found)
        _phases(console, found)
        _doubts(console, busy, max(stage["mean_error"] for stage in found["stages"]))
        console.print(f"simulate with: --cost fitted:{out}", soft_wrap=True)
    else:
        timed = found["operators"]
        console.print(
            f"{timed['steps']} steps timed by operator. A step of a real run takes {timed['factor']:.3g} times its operators "
            f"and {_us(timed['step_s'])} us more; off by {timed['mean_error']:.1%} on average",
            soft_wrap=True,
        )
        _phases(console, found)
        _doubts(console, busy, timed["mean_error"])
        console.print(f"what was timed: workbench profile show {out}", soft_wrap=True)
        console.print(f"simulate with: --cost profile:{out}", soft_wrap=True)


def _stages(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    from backends.simulated.cost.models.fitted import TERMS

    for number, stage in enumerate(found["stages"]):
        table = Table(box=None, pad_edge=False, title=f"stage {number}" if len(found["stages"]) > 1 else None)
        table.add_column("step time")
        table.add_column("us", justify="right")
        for term in TERMS:
            table.add_row(term.removesuffix("_s").replace("_", " "), _us(stage[term]))
        table.add_row("knee, tokens", str(stage["knee_tokens"]))
        console.print(table)
        console.print(
            f"{stage['steps']:,} steps: off by {stage['mean_error']:.1%} on average, {stage['total_error']:+.1%} in total"
        )


def _measure(
    out: Path, force: bool, quiet: bool, backend: str, load_format: str, flags: dict[str, Any]
) -> dict[str, Any]:
    import shutil

    from workbench.scheduler.config import ConfigError
    from workbench.settings.loading import settings_from

    settings = settings_from(None, flags)
    try:
        from workbench.calibrate.measure import measure, points_folder
        from workbench.cluster.device import choose_device

        device = choose_device(backend)
    except ModuleNotFoundError as error:
        raise ConfigError(f"measuring needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    points = points_folder(out)
    if force and (points / "conditions.json").is_file():
        shutil.rmtree(points)
    kept = f"what was measured is in {points}; the same command goes on from there"
    with measuring(quiet, "loading the model", kept) as update:
        return measure(settings, device, load_format, out, update)


PER = {
    "rank": "GPU beside the first",
    "prefill": "prompt",
    "token": "prompt token",
    "message": "new request",
    "ended": "request that ends",
}
"""What phases are of that are not of a step, where their names do not say it."""


def _phases(console: Any, found: dict[str, Any]) -> None:
    """Show the CPU phases in their order: what a step takes, and so much for each of other things."""
    from dataclasses import fields

    from rich.table import Table

    from backends.simulated.host import HostModel

    table = Table(box=None, pad_edge=False)
    for name in ("CPU phase", "for each", "us"):
        table.add_column(name, justify="right" if name == "us" else "left")
    for field in fields(HostModel):
        if field.name not in found["host"]:
            continue
        phase, _, of = field.name.removesuffix("_s").partition("_")
        of = "sampled token" if (phase, of) == ("process", "token") else PER.get(of, of or "step")
        table.add_row(phase, of, _us(found["host"][field.name]))
    console.print(table)


def _doubts(console: Any, busy: float | None, mean_error: float) -> None:
    from workbench.calibrate.doubts import doubts

    for note in doubts(busy, mean_error):
        console.print(f"note: {note}", highlight=False, style="dim", soft_wrap=True)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.4g}"
