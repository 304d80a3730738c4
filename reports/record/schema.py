"""The columns of a run record: names, order, kinds. docs/run-record.md defines them for readers."""

from __future__ import annotations

from enum import Enum

FORMAT = "workbench run"
FORMAT_VERSION = 1

META_FILE = "meta.json"
REQUESTS_FILE = "requests.csv"
ITERATIONS_FILE = "iterations.csv"
ITL_FILE = "itl.csv"
EVENTS_FILE = "events.csv"
DECISIONS_FILE = "decisions.jsonl"
RECORD_FILES = frozenset({META_FILE, REQUESTS_FILE, ITERATIONS_FILE, ITL_FILE, EVENTS_FILE, DECISIONS_FILE})
PAGE_FILE = "report.html"
TRACE_FILE = "trace.jsonl"
"""Beside the run of a server: what came, as a trace."""
TRACE_PARTIAL = ".trace.partial"
INSTANCES_PARTIAL = ".instances.partial"
"""Folder of what the instances of a fleet leave, until it is one record."""
"""That trace while the server runs: one line for each request that has ended."""

MODES = ("prefill", "decode", "mixed")
"""Words of the `mode` column; in memory a mode is its place in this tuple."""
PREFILL, DECODE, MIXED = range(3)

FINISHED = "finished"
ABORTED = "aborted"
REJECTED = "rejected"
UNFINISHED = "unfinished"


class Kind(Enum):
    """Form of a column in memory and in the file."""

    TEXT = "text"  # list[str], "" where unknown
    INT = "int"  # int64
    TIME = "time"  # float64 seconds on a grid of nanoseconds, NaN (written empty) where it did not happen
    NUMBER = "number"  # float64, NaN (written empty) where unknown
    MODE = "mode"  # int8 code, written as a word of MODES


REQUEST_COLUMNS: dict[str, Kind] = {
    "request_id": Kind.TEXT,
    "session_id": Kind.TEXT,
    "instance": Kind.INT,
    "arrival_s": Kind.TIME,
    "queued_s": Kind.TIME,
    "scheduled_s": Kind.TIME,
    "first_token_s": Kind.TIME,
    "finish_s": Kind.TIME,
    "input_tokens": Kind.INT,
    "output_tokens": Kind.INT,
    "cached_tokens": Kind.INT,
    "retractions": Kind.INT,
    "status": Kind.TEXT,
    "slo_ttft_s": Kind.TIME,
    "slo_tpot_s": Kind.TIME,
    "priority": Kind.NUMBER,
    "turn": Kind.NUMBER,
    "prefill_instance": Kind.NUMBER,
    "decode_instance": Kind.NUMBER,
    "bootstrap_s": Kind.TIME,
    "prefill_start_s": Kind.TIME,
    "prefill_end_s": Kind.TIME,
    "transfer_start_s": Kind.TIME,
    "transfer_end_s": Kind.TIME,
    "decode_admission_s": Kind.TIME,
}

HANDOVER_COLUMNS = (
    "prefill_instance",
    "decode_instance",
    "bootstrap_s",
    "prefill_start_s",
    "prefill_end_s",
    "transfer_start_s",
    "transfer_end_s",
    "decode_admission_s",
)
"""Of requests that one instance prefills and another decodes; a file has them only where there are such."""
OPTIONAL_REQUEST_COLUMNS = frozenset({"slo_ttft_s", "slo_tpot_s", "priority", "turn", *HANDOVER_COLUMNS})
"""May be missing, in memory and in a file; they then hold NaN."""

ITERATION_COLUMNS: dict[str, Kind] = {
    "iteration": Kind.INT,
    "instance": Kind.INT,
    "stage": Kind.INT,
    "mode": Kind.MODE,
    "launch_s": Kind.TIME,
    "start_s": Kind.TIME,
    "end_s": Kind.TIME,
    "requests": Kind.INT,
    "prefill_tokens": Kind.INT,
    "decode_tokens": Kind.INT,
    "context_tokens": Kind.INT,
    "kv_used_tokens": Kind.INT,
    "waiting": Kind.INT,
    "running": Kind.INT,
    "receive_s": Kind.TIME,
    "schedule_s": Kind.TIME,
    "launch_host_s": Kind.TIME,
    "process_s": Kind.TIME,
}

HOST_PHASES = ("receive_s", "schedule_s", "launch_host_s", "process_s")
"""Phases of the CPU in one iteration, in their order."""

TIMES_OF_EVERY_LINE = frozenset({"arrival_s", "itl_s", "launch_s", "start_s", "end_s", *HOST_PHASES})
"""Times that cannot be missing: others may not have come to pass."""

EVENT_COLUMNS: dict[str, Kind] = {
    "request_id": Kind.TEXT,
    "instance": Kind.INT,
    "iteration": Kind.INT,
    "event": Kind.TEXT,
    "tokens": Kind.INT,
}
CHUNK, RETRACTED = "prefill", "retracted"
"""Values of `event`: a part of a prompt was in the batch of this iteration; the request lost its KV to make room for it."""

ITL_COLUMNS: dict[str, Kind] = {"itl_s": Kind.TIME, "count": Kind.INT}
