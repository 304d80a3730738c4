"""``workbench calibrate --front-end``: what HTTP, tokenizer and detokenizer of our server take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.cli.measuring import measuring

if TYPE_CHECKING:
    from workbench.calibrate.measured_front_end import Found

COSTS = {"request_s": "a request", "prompt_token_s": "a prompt token", "chunk_s": "a streamed chunk"}


def calibrate_front_end(out: Path, force: bool, as_json: bool, tokenizer: str | None) -> None:
    """Measure it and write the file for ``--front-end``. Raises InputError, also for a file that is there."""
    from ground.json_file import json_text
    from workbench.scheduler.config import ConfigError

    if out.suffix != ".toml":
        raise ConfigError(f"out: {out}: a front end is kept in a file of its own; --out NAME.toml")
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists; --force replaces it")
    try:
        import httpx2  # noqa: F401
        import uvicorn  # noqa: F401
        import zmq  # noqa: F401

        from workbench.calibrate.front_end_fit import write_front_end
    except ModuleNotFoundError as error:
        raise ConfigError(f"measuring needs the package {error.name!r}: pip install 'llm-workbench[live]'") from error
    found = _measured(as_json, tokenizer)
    write_front_end(out, found.model, about(found))
    if as_json:
        print(json_text({**found.to_json(), "out": str(out)}))
        return
    _print(found, out)


def _measured(quiet: bool, tokenizer: str | None) -> Found:
    from workbench.calibrate.measured_front_end import measure_front_end

    with measuring(quiet, "", "nothing was written") as update:
        return measure_front_end(tokenizer, update)


def about(found: Found) -> list[str]:
    """Say in lines of comment what the numbers are."""
    import platform

    import workbench

    check = found.held_out
    return [
        f"Front end of workbench {workbench.__version__} on {platform.machine()} {_cpu()}, Python "
        f"{platform.python_version()}, tokenizer: {found.tokenizer}.",
        f"CPU time of the HTTP process, off by {found.http.mean_error:.1%} on average over {len(found.http.loads)} loads. Of a "
        f"held-out load: TTFT {_ms(check.measured['ttft_s'])} ms, predicted "
        f"{_ms(check.predicted['ttft_s'])}.",
        *(note[0].upper() + note[1:] + "." for note in notes(found)),
    ]


def _cpu() -> str:
    """Name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _print(found: Found, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    costs = Table(box=None, pad_edge=False)
    for name in ("CPU time, us", "HTTP process", "detokenizer"):
        costs.add_column(name, justify="left" if name.startswith("CPU") else "right")
    for name, words in COSTS.items():
        costs.add_row(words, *(f"{getattr(each, name) * 1e6:,.4g}" for each in (found.http, found.detokenizer)))
    console.print(costs)
    model = found.model
    console.print(
        f"A request at rest waits {_ms(model.latency_s)} ms beside that: client, connection, hops between processes.",
        highlight=False,
        soft_wrap=True,
    )
    if model.chunk_s:
        console.print(f"It hands on {1 / model.chunk_s:,.0f} tokens a second at most.", highlight=False)
    console.print()
    fits = Table(box=None, pad_edge=False)
    for name in ("CPU time of the HTTP process, ms", "measured", "fitted", "off by"):
        fits.add_column(name, justify="left" if name.startswith("CPU") else "right")
    for name, spent, fitted in found.http.loads:
        fits.add_row(name, _ms(spent), _ms(fitted), f"{fitted / spent - 1:+.1%}")
    console.print(fits)
    console.print()
    held = Table(box=None, pad_edge=False)
    for name in ("held-out load, ms", "measured", "predicted", "off by", "without a front end"):
        held.add_column(name, justify="left" if name.startswith("held") else "right")
    check = found.held_out
    for name, words in (("ttft_s", "TTFT, mean"), ("itl_s", "ITL, mean")):
        seen, said, without = check.measured[name], check.predicted[name], check.without[name]
        held.add_row(words, _ms(seen), _ms(said), f"{said / seen - 1:+.1%}", _ms(without))
    console.print(held)
    for note in notes(found):
        console.print(f"note: {note}", highlight=False, style="dim", soft_wrap=True)
    console.print(f"simulate with: --front-end {out}", highlight=False, soft_wrap=True)


def notes(found: Found) -> list[str]:
    """Say what to know of what was measured."""
    from workbench.calibrate.doubts import doubts

    holds = "CPU times hold; the latency and what the held-out load took are longer for it"
    said = doubts(found.busy, found.http.mean_error, holds)
    if found.tokenizer == "built-in bytes":
        said.append("a prompt token was a byte; what one takes a model's tokenizer is measured with --tokenizer FOLDER")
    return said


def _ms(seconds: Any) -> str:
    return f"{seconds * 1e3:,.4g}"
