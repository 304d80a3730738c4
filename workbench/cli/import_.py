"""``workbench import``: a measured run of another engine as a run record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from reports.record.run_record import RunRecord


def import_run(
    source: Annotated[
        Path,
        typer.Argument(
            help="A result of vllm bench serve (--save-detailed), of SGLang's bench_serving (--output-details), of guidellm or "
            "of aiperf, or the folder of a run of LLMServingSim's benchmarks.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the record to write.", show_default=False)],
    name: Annotated[
        Optional[str], typer.Option("--name", help="What the run is called. Default: as the source.")
    ] = None,
    run: Annotated[
        Optional[int], typer.Option("--run", help="Which run of a file that holds several, from 1.", show_default=False)
    ] = None,
    trace: Annotated[
        Optional[Path],
        typer.Option(
            "--trace",
            help="Also write the requests that finished as a trace to simulate: when they came and how long they were.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier record, and the trace.")] = False,
) -> None:
    """Turn a measured run of another engine into a run record, for `compare`."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from reports.imported.recognise import read_results
        from reports.record.errors import RecordError
        from workbench.cli.runs import command_line

        if trace is not None and trace.resolve() == source.resolve():
            raise RecordError(f"--trace {trace}: is the file to import")
        record = read_results(source, name, command_line(), run)
        _write(record, out, trace, force)
        settings = {
            key: value for key, value in record.meta["settings"].items() if key not in ("engine_kwargs", "client")
        }
        print(f"{len(record.requests['request_id'])} requests of {record.meta['model']}: {out}")
        print("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        for note in record.meta["trace"]["notes"]:
            print(f"note: {note}")
        print(f"simulate the same: workbench simulate {trace or 'TRACE'} --like {out} --cost profile:PATH")


def _write(record: RunRecord, out: Path, trace: Path | None, force: bool) -> None:
    """Write the record and the trace of its requests, both or neither."""
    from reports.record.run_record import prepare_out, write_record

    before = trace.read_bytes() if trace is not None and trace.is_file() else None
    if trace is not None:
        from workbench.recording.imported_trace import write_requests

        write_requests(record, trace, force)
    try:
        prepare_out(out, force)
        write_record(record, out)
    except BaseException:
        if trace is not None and before is None:
            trace.unlink(missing_ok=True)
        elif trace is not None and before is not None:
            trace.write_bytes(before)
        raise
