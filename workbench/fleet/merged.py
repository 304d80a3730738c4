"""Records of instances, made one: requests, iterations, gaps, events, and the trace of the traffic."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from reports.record.run_record import RunRecord

Columns = dict[str, Any]
HANDED_OVER = "handed_over"
"""Status of the half of a request that has gone on elsewhere."""


def merged(meta: dict[str, Any], parts: Mapping[int, RunRecord], roles: Mapping[int, str]) -> RunRecord:
    """Return the record of a fleet, by numbers of its instances. Times of all count from the same moment.

    Requests that two instances share are one line. Names that several requests have are told apart, see :func:`names`.
    """
    named = names({number: part.requests["request_id"] for number, part in parts.items() if roles[number] != "prefill"})
    requests = _requests(parts, roles, named)
    iterations = _in_time(
        [_with_instance(part.iterations, number) for number, part in parts.items()],
        [np.maximum.accumulate(part.iterations["launch_s"]) for part in parts.values()],
    )
    halves = {own: name for number in named for own, name in named[number].items()}
    events = _in_time(
        [
            {
                **_with_instance(part.events, number),
                "request_id": [
                    (halves if roles[number] == "prefill" else named[number]).get(own, own)
                    for own in part.events["request_id"]
                ],
            }
            for number, part in parts.items()
        ],
        [_moments(part) for part in parts.values()],
    )
    gaps = tuple(np.concatenate([part.itl[i] for part in parts.values()]) for i in (0, 1))
    return RunRecord(meta, requests, iterations, (gaps[0], gaps[1]), events)


def names(of: Mapping[int, Sequence[str]]) -> dict[int, dict[str, str]]:
    """Return what requests of instances are called in the record of all: by instance, as they are, but where several
    instances have a name, with the instance behind it. Clients give names again, and a router sends a request again."""
    seen: dict[str, int] = {}
    for own in of.values():
        for name in own:
            seen[name] = seen.get(name, 0) + 1
    return {
        number: {name: name if seen[name] == 1 else f"{name}@{number}" for name in own} for number, own in of.items()
    }


def _requests(
    parts: Mapping[int, RunRecord], roles: Mapping[int, str], named: Mapping[int, Mapping[str, str]]
) -> Columns:
    halves: dict[str, tuple[int, Columns, int]] = {}
    for number, part in parts.items():
        if roles[number] == "prefill":
            halves |= {own: (number, part.requests, i) for i, own in enumerate(part.requests["request_id"])}
    each = []
    for number, part in parts.items():
        if roles[number] == "prefill":
            continue
        columns = _with_instance(part.requests, number)
        if roles[number] == "decode":
            columns = _joined(columns, halves, number)
        columns["request_id"] = [named[number][own] for own in part.requests["request_id"]]
        each.append(columns)
    return _in_time(each, [columns["arrival_s"] for columns in each])


_OF_PREFILL = ("bootstrap_s", "prefill_start_s", "prefill_end_s", "transfer_start_s")
"""Moments that the prefill instance knows."""


def _joined(columns: Columns, halves: Mapping[str, tuple[int, Columns, int]], decode: int) -> Columns:
    """Requests of a decode instance, with what their other halves know."""
    columns = {name: np.array(v) if isinstance(v, np.ndarray) else list(v) for name, v in columns.items()}
    for i, own in enumerate(columns["request_id"]):
        columns["decode_instance"][i] = decode
        if own not in halves:
            columns["prefill_instance"][i] = np.nan
            continue
        number, other, place = halves[own]
        columns["prefill_instance"][i] = number
        for name in (*_OF_PREFILL, "queued_s", "scheduled_s"):
            columns[name][i] = other[name][place]
        columns["cached_tokens"][i] = max(columns["cached_tokens"][i], other["cached_tokens"][place])
    return columns


def _with_instance(columns: Columns, number: int) -> Columns:
    count = len(next(iter(columns.values())))
    return {**columns, "instance": np.full(count, number, np.int64)}


def _moments(part: RunRecord) -> np.ndarray:
    """When the iteration of each event of an instance was launched."""
    launched = dict(zip(part.iterations["iteration"].tolist(), part.iterations["launch_s"].tolist(), strict=True))
    moments = [launched.get(iteration, 0.0) for iteration in part.events["iteration"].tolist()]
    return np.maximum.accumulate(np.array(moments, np.float64))


def _in_time(each: Sequence[Columns], keys: Sequence[np.ndarray]) -> Columns:
    """Put columns of several instances together by ascending keys; those of one instance stay in their order."""
    order = np.argsort(np.concatenate(keys), kind="stable")
    found: Columns = {}
    for name in each[0]:
        if isinstance(each[0][name], np.ndarray):
            found[name] = np.concatenate([columns[name] for columns in each])[order]
        else:
            values = [value for columns in each for value in columns[name]]
            found[name] = [values[i] for i in order]
    return found


def merge_traces(parts: Mapping[int, Path], named: Mapping[int, Mapping[str, str]], out: Path) -> int:
    """Write the trace of all traffic, its first request at 0, and return how many requests it has."""
    encode, count, begin_s = msgspec.json.Encoder().encode, 0, 0.0
    streams = [_arrivals(path, number) for number, path in parts.items()]
    with out.open("wb") as file:
        for arrival_s, number, _, line in heapq.merge(*streams, key=lambda each: each[:3]):
            begin_s = arrival_s if not count else begin_s
            count += 1
            line["arrival_s"] = round(arrival_s - begin_s, 6)
            line["request_id"] = named[number].get(line["request_id"], line["request_id"])
            file.write(encode(line) + b"\n")
    return count


def _arrivals(path: Path, number: int) -> Iterator[tuple[float, int, int, dict[str, Any]]]:
    with path.open("rb") as file:
        for place, text in enumerate(file):
            line = msgspec.json.decode(text)
            yield line["arrival_s"], number, place, line
