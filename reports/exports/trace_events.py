"""A run as Chrome trace events, the JSON that Perfetto and chrome://tracing open.

Every instance of every run is a process. Its threads are the CPU (one bar a phase) and each GPU stage (one bar a batch,
the batch in its arguments); its requests are asynchronous tracks with queued, prefill, decode and retracted nested in
them; KV on its way to another instance is a track of the one that sends it; running, waiting and KV are counters. Times
are microseconds of the run's clock, with nanoseconds behind the point. Events are in order of time, and of those that
begin together the longer comes first, so that bars nest.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ground.json_file import json_line
from ground.whole_file import partial_path
from reports.metrics.host_lane import PHASES, host_lane_of
from reports.metrics.instances import instance_names
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord
from reports.record.schema import MODES
from reports.timeline.waterfall import Part, request_parts

_NS = 1_000_000_000
CPU_THREAD = 0
"""Thread of the CPU; stage `k` is thread `k + 1`."""


class _Event(NamedTuple):
    at_ns: int
    order: int
    """Order among events of one moment: what ends first, outermost first; then what begins, longest first."""
    text: str


def write_trace_events(records: Mapping[str, RunRecord], path: str | Path) -> int:
    """Write `records` to `path`, gzipped if its name ends in .gz; return the number of events.

    The bytes depend on the records alone. Raises `RecordError` if it cannot be written.
    """
    path = Path(path)
    partial = partial_path(path)
    number = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as raw:
            # No time stamp and no name in the header: the same bytes every time.
            packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
            packed.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')
            for text in trace_events(records):
                packed.write((",\n" if number else "").encode() + text.encode())
                number += 1
            packed.write(b"\n]}\n")
            if packed is not raw:
                packed.close()
        os.replace(partial, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RecordError(f"{path}: cannot be written: {problem.strerror or problem}") from problem
    return number


def trace_events(records: Mapping[str, RunRecord]) -> Iterator[str]:
    """Yield the events as JSON texts: first the names of processes and threads, then everything in order of time."""
    events: list[_Event] = []
    process = 0
    for name, record in records.items():
        column = record.iterations
        names = instance_names(record)
        senders = record.requests["prefill_instance"]
        sent = senders[~np.isnan(senders)].astype(np.int64)
        instances = sorted({*record.requests["instance"].tolist(), *sent.tolist(), *column["instance"].tolist()})
        origin_ns = _origin_ns(record)
        for instance in instances:
            process += 1
            stages = int(column["stage"][column["instance"] == instance].max(initial=0)) + 1
            label = name if len(instances) == 1 else f"{name}, {names.get(instance, f'instance {instance}')}"
            yield _named("process_name", process, 0, label)
            yield _named("process_sort_index", process, 0, process)
            if len(column["iteration"]):
                for thread in range(stages + 1):
                    lane = "CPU" if thread == CPU_THREAD else "GPU" if stages == 1 else f"GPU {thread - 1}"
                    yield _named("thread_name", process, thread, lane)
                    yield _named("thread_sort_index", process, thread, thread)
                events += _cpu(record, instance, process, origin_ns)
                events += _gpu(record, instance, process, origin_ns)
            events += _requests(record, instance, process, origin_ns)
            events += _transfers(record, instance, process, origin_ns)
    events.sort(key=lambda event: (event.at_ns, event.order))
    for event in events:
        yield event.text


def _named(what: str, process: int, thread: int, value: str | int) -> str:
    args = {"sort_index": value} if what.endswith("sort_index") else {"name": value}
    return json_line({"ph": "M", "name": what, "pid": process, "tid": thread, "ts": 0, "args": args})


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def _ns(seconds: np.ndarray) -> list[int]:
    return np.rint(np.nan_to_num(seconds) * _NS).astype(np.int64).tolist()


def _origin_ns(record: RunRecord) -> int:
    """Find the first moment of a run: nothing may happen before zero."""
    column = record.iterations
    moments = [record.requests["arrival_s"]]
    if len(column["iteration"]):
        host_s = column["launch_s"] - column["launch_host_s"] - column["schedule_s"] - column["receive_s"]
        moments += [host_s, column["start_s"]]
    first = min((float(np.nanmin(values)) for values in moments if len(values)), default=0.0)
    return min(int(np.floor(first * _NS)), 0)


def _bar(process: int, thread: int, name: str, begin_ns: int, end_ns: int, args: str) -> _Event:
    text = (
        f'{{"ph":"X","name":"{name}","cat":"{"cpu" if thread == CPU_THREAD else "gpu"}","pid":{process},"tid":{thread},'
        f'"ts":{_us(begin_ns)},"dur":{_us(end_ns - begin_ns)},"args":{{{args}}}}}'
    )
    return _Event(begin_ns, begin_ns - end_ns, text)


def _cpu(record: RunRecord, instance: int, process: int, origin_ns: int) -> Iterator[_Event]:
    lane = host_lane_of(record, instance)
    free_ns = 0
    iterations = record.iterations["iteration"][lane.row].tolist()
    bars = zip(lane.kind.tolist(), _ns(lane.begin_s), _ns(lane.end_s), iterations, strict=True)
    for kind, begin_ns, end_ns, iteration in bars:
        # Rounding must not make one bar reach a nanosecond into the next.
        begin_ns, end_ns = max(begin_ns - origin_ns, free_ns), end_ns - origin_ns
        if end_ns > begin_ns:
            yield _bar(process, CPU_THREAD, PHASES[kind], begin_ns, end_ns, f'"iteration":{iteration}')
            free_ns = end_ns


_BATCH = (
    "iteration",
    "requests",
    "prefill_tokens",
    "decode_tokens",
    "context_tokens",
    "kv_used_tokens",
    "waiting",
    "running",
)


def _gpu(record: RunRecord, instance: int, process: int, origin_ns: int) -> Iterator[_Event]:
    column = record.iterations
    for stage in range(int(column["stage"].max()) + 1):
        rows = np.flatnonzero((column["instance"] == instance) & (column["stage"] == stage))
        rows = rows[np.argsort(column["start_s"][rows], kind="stable")]
        starts, ends = _ns(column["start_s"][rows]), _ns(column["end_s"][rows])
        batches = zip(*(column[name][rows].tolist() for name in _BATCH), strict=True)
        free_ns = 0
        for mode, begin, end, batch in zip(column["mode"][rows].tolist(), starts, ends, batches, strict=True):
            begin_ns, end_ns = max(begin - origin_ns, free_ns), end - origin_ns
            if end_ns > begin_ns:
                args = ",".join(f'"{name}":{value}' for name, value in zip(_BATCH, batch, strict=True))
                yield _bar(process, stage + 1, MODES[mode], begin_ns, end_ns, args)
                free_ns = end_ns
            if stage == 0:
                at_ns = begin_ns
                yield _counter(process, "requests", at_ns, f'"running":{batch[7]},"waiting":{batch[6]}')
                yield _counter(process, "KV tokens", at_ns, f'"used":{batch[5]}')


def _counter(process: int, name: str, at_ns: int, args: str) -> _Event:
    return _Event(at_ns, 1, f'{{"ph":"C","name":"{name}","pid":{process},"tid":0,"ts":{_us(at_ns)},"args":{{{args}}}}}')


def _requests(record: RunRecord, instance: int, process: int, origin_ns: int) -> Iterator[_Event]:
    column = record.requests
    parts_of = request_parts(record)
    for row in np.flatnonzero(column["instance"] == instance).tolist():
        parts: list[Part] = parts_of[row]
        if not parts:
            continue
        request_id = column["request_id"][row]
        begin_ns, end_ns = (round(moment * _NS) - origin_ns for moment in (parts[0].begin_s, parts[-1].end_s))
        args = {
            name: int(column[name][row]) for name in ("input_tokens", "output_tokens", "cached_tokens", "retractions")
        } | {"status": column["status"][row]}
        yield _async("b", process, request_id, request_id, begin_ns, -3, args)
        free_ns = begin_ns
        for part in parts:
            # On the grid of nanoseconds a part may vanish; what vanished must not end before it began.
            till_ns = min(round(part.end_s * _NS) - origin_ns, end_ns)
            if till_ns > free_ns:
                tokens = {"tokens": part.tokens} if part.tokens else {}
                yield _async("b", process, request_id, part.kind, free_ns, -1, tokens)
                yield _async("e", process, request_id, part.kind, till_ns, -5, {})
                free_ns = till_ns
        yield _async("e", process, request_id, request_id, end_ns, -4, {})


def _transfers(record: RunRecord, instance: int, process: int, origin_ns: int) -> Iterator[_Event]:
    """KV on its way from an instance: a track a request, beside the instance's threads."""
    column, names = record.requests, instance_names(record)
    sent = (column["prefill_instance"] == instance) & ~np.isnan(column["transfer_start_s"])
    for row in np.flatnonzero(sent & ~np.isnan(column["transfer_end_s"])).tolist():
        begin_ns, end_ns = (
            round(float(column[name][row]) * _NS) - origin_ns for name in ("transfer_start_s", "transfer_end_s")
        )
        target = int(column["decode_instance"][row])
        name = f"KV to {names.get(target, f'instance {target}')}"
        args = {"request": column["request_id"][row], "input_tokens": int(column["input_tokens"][row])}
        yield _async("b", process, column["request_id"][row], name, begin_ns, -3, args, "kv transfer")
        yield _async("e", process, column["request_id"][row], name, end_ns, -4, {}, "kv transfer")


def _async(
    phase: str,
    process: int,
    request_id: str,
    name: str,
    at_ns: int,
    order: int,
    args: Mapping[str, Any],
    category: str = "request",
) -> _Event:
    event = {"ph": phase, "cat": category, "id": f"{process}/{request_id}", "name": name, "pid": process, "tid": 0}
    text = json_line(event)[:-1] + f',"ts":{_us(at_ns)},"args":{json_line(args)}}}'
    # Far below any bar's length: ends of what is inside, then of the request, then the request's begin, then its parts'.
    return _Event(at_ns, order - (1 << 60), text)
