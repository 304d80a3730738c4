"""``workbench observe``: a trace against somebody's running server, to the same record as a simulation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from workbench.cli import options
from workbench.cli.flags import SettingFlags, command_with, given
from workbench.cli.options import option
from workbench.cli.trace_flags import TraceFlags, TraceReading
from workbench.scheduler.settings import TRACE

if TYPE_CHECKING:
    import numpy as np

    from workbench.clients.observe import Observer, ObserveSettings

_SERVER = "Server"


Command = command_with(SettingFlags("workbench.settings.run_settings:LoadSettings"), TraceFlags())


def observe(
    ctx: typer.Context,
    url: Annotated[
        str,
        typer.Argument(help="Base URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000.", show_default=False),
    ],
    trace: Annotated[Path, option("--trace", help="Trace file: any known format, plain, gzip or zstd.", panel=TRACE)],
    model: Annotated[
        Optional[str],
        option("--model", help="Name the server knows the model by. Default: the only one it serves.", panel=_SERVER),
    ] = None,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            "--api-key",
            envvar="OPENAI_API_KEY",
            help="Key to send as a bearer token.",
            rich_help_panel=_SERVER,
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    vocab: Annotated[
        Optional[int],
        option(
            "--vocab",
            help="Token ids of made-up prompts are below this. Default: the tokenizer's, or the catalogue's model of that name.",
            panel=_SERVER,
        ),
    ] = None,
    out: options.Out = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    max_tokens: Annotated[
        Optional[int],
        option(
            "--max-tokens",
            help="Output bound of requests that have none. Default: what the trace says they write.",
            panel=TRACE,
        ),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],
        option(
            "--tokenizer",
            help="tokenizer.json or its folder: for traces of text, and for servers that take prompts as text only.",
            panel=TRACE,
        ),
    ] = None,
) -> None:
    """Send TRACE to a running server in real time, streamed, and record what its clients see."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from workbench.scheduler.config import ConfigError

        try:
            from workbench.clients.observe import ObserveSettings
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"observing needs the package {error.name!r}: pip install 'llm-workbench[live]'"
            ) from error
        load = {name: value for name, value in given(ctx, "settings").items() if value is not None}
        settings = ObserveSettings(url, model, max_tokens, **load)
        reading = {**given(ctx, "reading"), "tokenizer": tokenizer}
        _run(settings, trace, out, force, as_json, reading, vocab, api_key)


def _run(
    settings: ObserveSettings,
    path: Path,
    out: Path | None,
    force: bool,
    as_json: bool,
    reading: TraceReading,
    vocab: int | None,
    api_key: str | None,
) -> None:
    from reports.record.run_record import prepare_out, write_record
    from traces.requests.text import load_tokenizer
    from workbench.cli.runs import command_line, free_folder, open_reshaped
    from workbench.clients.observe import Observer
    from workbench.clients.observe import observe as run_observer
    from workbench.recording.observed import failures, observed_record
    from workbench.scheduler.config import ConfigError

    if not settings.url.startswith(("http://", "https://")):
        raise ConfigError(f"{settings.url}: not the URL of a server: it begins with http:// or https://")
    trace = open_reshaped(path, reading, settings)
    sha256 = trace.sha256()
    tokenizer: Path | None = reading["tokenizer"]
    reader: Any = load_tokenizer(tokenizer) if tokenizer is not None else None

    def text_of(ids: np.ndarray) -> str:
        return reader.decode(ids.tolist(), skip_special_tokens=False)

    def vocab_of(model: str) -> int | None:
        return vocab or (reader.get_vocab_size() if reader is not None else _catalogue_vocab(model))

    folder = out if out is not None else free_folder(Path("runs") / f"{trace.info.name}-observed")
    prepare_out(folder, force)
    observer = Observer(settings, trace, vocab_of, api_key=api_key, text_of=text_of if reader is not None else None)
    try:
        _observe_shown(observer, run_observer, as_json)
        if not observer.rows:
            raise ConfigError("interrupted before the first request: there is nothing to record")
        record = observed_record(observer, sha256, command_line())
        write_record(record, folder)
    except Exception:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    _report(record, folder, settings, as_json)
    if (lost := failures(record, observer)) is not None:
        print(f"warning: {lost}", file=sys.stderr)
    if observer.interrupted:
        print(f"interrupted: what was observed is in {folder}", file=sys.stderr)
        raise typer.Exit(130)


def _observe_shown(observer: Observer, run: Any, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from workbench.cli.waits import SaidWaits

    columns = (
        SpinnerColumn(),
        TextColumn("observing"),
        TextColumn("{task.fields[time]:,.1f} s"),
        TextColumn("{task.fields[sent]:,} sent"),
        TextColumn("{task.fields[ended]:,} ended"),
        TextColumn("{task.fields[failed]:,} failed"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None, time=0.0, sent=0, ended=0, failed=0)

        def update(seconds: float, sent: int, ended: int, failed: int, pieces: int) -> None:
            bar.update(task, time=seconds, sent=sent, ended=ended, failed=failed)

        observer.progress = update
        observer.waiting = SaidWaits()
        run(observer)


def _report(record: Any, folder: Path, settings: ObserveSettings, as_json: bool) -> None:
    from reports.exports.runs_json import to_json
    from reports.metrics.cuts import cut_lines
    from reports.metrics.summary import summarise
    from reports.terminal.full_table import comparison_table

    summaries = {record.name: summarise(record, settings.slo_ttft, settings.slo_tpot)}
    if as_json:
        print(to_json(summaries, {record.name: folder}, None, records={record.name: record}))
        return
    from rich.console import Console

    console = Console()
    console.print(comparison_table(summaries))
    for note in (*record.meta["trace"]["notes"], *cut_lines({record.name: record})):
        console.print(f"note: {note}", highlight=False, style="dim")
    console.print(f"record: {folder}", highlight=False, soft_wrap=True)


def _catalogue_vocab(model: str) -> int | None:
    """The vocabulary of a model that the catalogue has."""
    from backends.simulated.catalogue.gpu_specs import CatalogueError
    from backends.simulated.catalogue.model_specs import load_model

    try:
        return load_model(model).vocab
    except CatalogueError:
        return None
