"""What a file or folder of measurements is, and the record that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ground.json_file import holds_lines, read_json, read_json_lines
from ground.value_file import read_yaml
from reports.imported import aiperf, bench_serving, guidellm
from reports.imported.client_run import client_record
from reports.imported.llmservingsim import FILES, read_measured
from reports.imported.place import Place
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord

TAKES = (
    "the folder of a run of LLMServingSim's benchmarks (requests.jsonl and meta.json)",
    "the JSON of vllm bench serve --save-result --save-detailed",
    "the JSON lines of SGLang's bench_serving --output-file FILE --output-details",
    "the JSON or YAML report of guidellm",
    "profile_export.jsonl of aiperf, or the folder that holds it",
)
"""What can be imported, for help and for the line about what cannot."""
_YAML = (".yaml", ".yml")
_MOST_LISTED = 12
_IN_FOLDER = (aiperf.RECORDS_FILE, "benchmarks.json", "benchmarks.yaml")
"""What tools call their files where the user does not."""


def read_results(source: Path, name: str | None = None, command: str = "", run: int | None = None) -> RunRecord:
    """The run that was measured in ``source`` as a record, called ``name``, else as the source is.

    ``run`` counts from 1 and chooses where a file holds several. Raises RecordError, with file, place and field.
    """
    if not source.exists():
        raise RecordError(f"{source}: no such file or folder")
    if source.is_dir():
        found = [source / file for file in _IN_FOLDER if (source / file).is_file()]
        if any((source / file).is_file() for file in FILES):
            _only_run(source, run)
            return read_measured(source, name, command)
        if not found:
            already = "a run record already" if (source / "requests.csv").is_file() else "nothing that can be imported"
            raise _not_taken(source, already)
        source = found[0]
    return _of_file(source, name, command, run)


def _of_file(source: Path, name: str | None, command: str, run: int | None) -> RunRecord:
    objects = _objects(source)
    first = objects[0].values
    called = name or (source.parent.resolve().name if source.name in _IN_FOLDER else source.stem)
    if guidellm.is_report(first):
        benchmarks = objects[0].objects("benchmarks")
        chosen = _chosen(source, benchmarks, run, guidellm.describe)
        return client_record(guidellm.read_run(chosen, objects[0]), called, command)
    if aiperf.is_record(first):
        _only_run(source, run)
        return client_record(aiperf.read_run(source, objects), called, command)
    if aiperf.is_summary(first):
        return _of_file(aiperf.records_beside(source), name, command, run)
    if bench_serving.is_result(first):
        chosen = _chosen(source, objects, run, bench_serving.describe)
        return client_record(bench_serving.read_run(chosen), called, command)
    if "queued_ts" in first or "engine_kwargs" in first:
        raise RecordError(f"{source}: is a part of a measured run: give the folder, which holds {' and '.join(FILES)}")
    raise _not_taken(source, "nothing that can be imported")


def _objects(source: Path) -> list[Place]:
    """The objects of a file, one at least: those of its lines, or the one that it is."""
    if source.suffix in _YAML:
        return [Place(source, "", read_yaml(source, RecordError))]
    if source.suffix != ".gz" and holds_lines(source, RecordError):
        lines = list(read_json_lines(source, RecordError))
        # Where there is one, it is the file.
        return [Place(source, f"line {number}" if len(lines) > 1 else "", values) for number, values in lines]
    try:
        return [Place(source, "", read_json(source, RecordError))]
    except RecordError:
        # Of a table, a log or a list it does not help to know at which column it is no object.
        if source.suffix != ".gz" and not (start := _start(source)).startswith(b"{"):
            raise _not_taken(source, "nothing that can be imported" if start else "empty") from None
        raise


def _start(source: Path) -> bytes:
    """The first line that is not blank, from its first character on; nothing of an empty file."""
    with source.open("rb") as file:
        return next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").lstrip()


def _chosen(source: Path, runs: Sequence[Place], number: int | None, describe: Callable[[Place], str]) -> Place:
    if not runs:
        raise RecordError(f"{source}: holds no run")
    if number is None and len(runs) == 1:
        return runs[0]
    if number is None or not 1 <= number <= len(runs):
        listed = "; ".join(f"{i}: {describe(run) or 'not described'}" for i, run in enumerate(runs[:_MOST_LISTED], 1))
        listed += "; ..." if len(runs) > _MOST_LISTED else ""
        problem = f"holds {len(runs)} runs" if number is None else f"--run {number}: there are {len(runs)}"
        raise RecordError(f"{source}: {problem}, choose with --run: {listed}")
    return runs[number - 1]


def _only_run(source: Path, number: int | None) -> None:
    if number not in (None, 1):
        raise RecordError(f"{source}: --run {number}: it holds one run")


def _not_taken(source: Path, problem: str) -> RecordError:
    return RecordError(f"{source}: {problem}; workbench import takes {'; '.join(TAKES)}")
