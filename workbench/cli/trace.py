"""`workbench trace`: generate, convert and describe traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.errors import one_line_errors
from workbench.cli.flags import command_with, given
from workbench.cli.trace_flags import LENGTHS, TraceFlags, TraceReading

if TYPE_CHECKING:
    from traces import Trace, TraceRequest
    from traces.describe import Description, Spread

app = typer.Typer(no_args_is_help=True, help="Generate, convert and describe traces.")

TraceArgument = Annotated[Path, typer.Argument(help="Trace file, plain, gzip or zstd.", show_default=False)]
OutArgument = Annotated[Path, typer.Argument(help="File to write; .gz and .zst compress.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]
Rate = Annotated[float | None, typer.Option(help="Stretch arrivals to this many a second.")]
Speedup = Annotated[float | None, typer.Option(help="Divide arrivals by this.")]
Requests = Annotated[int | None, typer.Option(help="Only the first so many requests.")]


@app.command("generate")
def generate_command(
    out: OutArgument,
    requests: Annotated[int, typer.Option(help="Requests in all, every turn counted.")] = 1000,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma, burst, constant or closed-loop.")] = "poisson",
    rate: Annotated[float, typer.Option(help="Session starts (single requests) a second.")] = 1.0,
    cv: Annotated[float, typer.Option(help="Of gamma arrivals: coefficient of variation of the gaps.")] = 2.0,
    burst_size: Annotated[int, typer.Option(help="Of burst arrivals: session starts in a burst.")] = 8,
    input: Annotated[str, typer.Option(help=f"New prompt tokens of a turn: {LENGTHS}.")] = "512",
    output: Annotated[str, typer.Option(help="Output tokens of a turn, said likewise.")] = "128",
    turns: Annotated[str, typer.Option(help="Turns of a session, said likewise.")] = "1",
    system_prompts: Annotated[int, typer.Option(help="Different system prompts; each session starts with one.")] = 0,
    system_tokens: Annotated[int, typer.Option(help="Tokens of a system prompt.")] = 1024,
    think_time: Annotated[float, typer.Option(help="Mean seconds before a later turn, exponential.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    force: Force = False,
) -> None:
    """Write a synthetic trace."""
    from traces.files.counted import counted
    from traces.generate import Workload, generate
    from traces.requests.lengths import parse_lengths
    from traces.write import write_trace

    with one_line_errors():
        workload = Workload(
            requests=requests,
            arrivals=arrivals,
            rate=rate,
            cv=cv,
            burst_size=burst_size,
            input_lengths=parse_lengths(input),
            output_lengths=parse_lengths(output),
            turns=parse_lengths(turns),
            system_prompts=system_prompts,
            system_tokens=system_tokens,
            think_time_s=think_time,
            seed=seed,
        )
        written = write_trace(_progress(generate(workload), "writing", requests), out, force)
    typer.echo(f"{out}: {counted(written, 'request')}", err=True)


@app.command("convert", cls=command_with(TraceFlags()))
def convert_command(
    ctx: typer.Context,
    trace: TraceArgument,
    out: OutArgument,
    rate: Rate = None,
    speedup: Speedup = None,
    requests: Requests = None,
    force: Force = False,
) -> None:
    """Write any trace that can be read as one of our own."""
    from traces.files.counted import counted
    from traces.write import write_trace

    with one_line_errors():
        opened = _open(trace, given(ctx, "reading"), rate, speedup, requests)
        written = write_trace(_progress(opened, "converting", requests), out, force)
    for note in opened.info.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{out}: {counted(written, 'request')}", err=True)


@app.command("describe", cls=command_with(TraceFlags()))
def describe_command(
    ctx: typer.Context,
    trace: TraceArgument,
    rate: Rate = None,
    speedup: Speedup = None,
    requests: Requests = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a trace's rates, lengths, burstiness, possible prefix reuse and sessions."""
    from traces.describe import describe

    with one_line_errors():
        opened = _open(trace, given(ctx, "reading"), rate, speedup, requests)
        figures = describe(_progress(opened, "reading", requests))
        info: dict[str, Any] = {
            "name": opened.info.name,
            "format": opened.info.format,
            "sha256": opened.sha256(),
            "closed_loop": opened.info.closed_loop,
            "notes": opened.info.notes,
        }
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(info | figures.to_dict())).decode())
    else:
        typer.echo("\n".join(_lines(info, figures)))


def _open(
    path: Path,
    reading: TraceReading,
    rate: float | None,
    speedup: float | None,
    requests: int | None,
) -> Trace:
    from traces.reshape import reshape
    from workbench.clients.trace_input import open_as

    return reshape(open_as(path, reading), rate, speedup, requests)


def _progress(requests: Iterable[TraceRequest], doing: str, total: int | None) -> Iterable[TraceRequest]:
    """Count requests on stderr while they pass, where somebody is looking."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        return requests
    return track(requests, doing, total=total, console=console, transient=True)


def _lines(info: dict[str, Any], figures: Description) -> Iterator[str]:
    def line(label: str, text: str) -> str:
        return f"{label:<16}{text}"

    def spread(values: Spread, digits: int = 0) -> str:
        numbers = (values.mean, values.p50, values.p90, values.p99, values.max)
        return "mean {}  p50 {}  p90 {}  p99 {}  max {}".format(*(f"{number:,.{digits}f}" for number in numbers))

    yield line("trace", f"{info['name']} ({info['format']})")
    yield line("requests", f"{figures.requests:,}, {figures.arrivals:,} with an arrival of their own")
    if figures.arrival_rate is not None:
        yield line("arrivals", f"{figures.arrival_rate:.4g}/s over {figures.span_s:,.1f} s")
        yield line(
            "burstiness",
            f"CV of gaps {figures.gap_cv:.2f}, peak {figures.peak_rate_1s:.4g}/s in 1 s, "
            f"{figures.peak_rate_10s:.4g}/s in 10 s",
        )
    else:
        yield line("arrivals", "all at the same time")
    yield line("input tokens", f"{figures.input_tokens:,}: {spread(figures.input_lengths)}")
    yield line("output tokens", f"{figures.output_tokens:,}: {spread(figures.output_lengths)}")
    yield line("prefix reuse", f"{figures.reusable_share:.1%} of input tokens, with an unlimited cache")
    if figures.turns is not None:
        yield line("sessions", f"{figures.sessions:,}, turns: {spread(figures.turns, 1)}")
    if figures.think_time_s is not None:
        yield line("think time (s)", spread(figures.think_time_s, 2))
    for note in info["notes"]:
        yield line("note", note)
