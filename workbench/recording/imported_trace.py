"""The requests of a measured run as a trace, so that the run can be simulated."""

from __future__ import annotations

from pathlib import Path

from reports.imported.client_run import counted
from reports.record.errors import RecordError
from reports.record.meta import TraceMeta
from reports.record.run_record import RunRecord
from reports.record.schema import FINISHED
from traces import open_trace
from traces.requests.trace_request import TraceRequest
from traces.write import write_trace


def write_requests(record: RunRecord, path: Path, force: bool) -> None:
    """Write when the requests that finished came and how long they were, and name the trace in the record.

    What they said is not known: no request shares tokens with another, and later turns of a session are requests of their
    own that come when they came. Raises RecordError where none finished, and TraceError.
    """
    columns = record.requests
    finished = [
        i
        for i, status in enumerate(columns["status"])
        if status == FINISHED and columns["input_tokens"][i] > 0 and columns["output_tokens"][i] > 0
    ]
    if not finished:
        raise RecordError(f"{path}: no request of the run finished, so there is none to write")
    write_trace(
        (
            TraceRequest(
                columns["request_id"][i],
                float(columns["arrival_s"][i]),
                int(columns["input_tokens"][i]),
                int(columns["output_tokens"][i]),
            )
            for i in sorted(finished, key=lambda i: columns["arrival_s"][i])
        ),
        path,
        force,
    )
    left_out = len(columns["status"]) - len(finished)
    notes = [f"not in {path.name}, for they did not finish: {counted(left_out, 'request')}"] if left_out else []
    written = open_trace(path)
    said = record.meta["trace"]["notes"]
    described = TraceMeta(written.info.name, written.info.format, written.sha256(), [*said, *notes])
    record.meta["trace"] = described.to_json()
