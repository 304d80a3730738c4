"""``workbench import``: a measured run of another engine as a run record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def import_run(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with requests.jsonl and meta.json, as LLMServingSim's benchmarks leave it.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the record to write.", show_default=False)],
    name: Annotated[
        Optional[str], typer.Option("--name", help="What the run is called. Default: the source's folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier record.")] = False,
) -> None:
    """Turn a measured run of another engine into a run record, for `compare`."""
    from workbench.cli.errors import one_line_errors

    with one_line_errors():
        from reports.record.measured import read_measured
        from reports.record.run_record import prepare_out, write_record
        from workbench.cli.runs import command_line

        record = read_measured(source, name, command_line())
        prepare_out(out, force)
        write_record(record, out)
        settings = {key: value for key, value in record.meta["settings"].items() if key != "engine_kwargs"}
        print(f"{len(record.requests['request_id'])} requests of {record.meta['model']}: {out}")
        print("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        print(f"simulate the same: workbench simulate TRACE --like {out} --cost profile:PATH")
