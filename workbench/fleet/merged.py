"""Records of instances, made one: requests, iterations, gaps, events, and the trace of the traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from reports.record.run_record import RunRecord

Columns = dict[str, Any]


def merged(
    meta: dict[str, Any],
    parts: Mapping[int, RunRecord],
    roles: Mapping[int, str],
    named: Mapping[int, Mapping[str, str]],
) -> RunRecord:
    """Return the record of a fleet, by numbers of its instances. Times of all count from the same moment; ``named`` is what
    :func:`names` calls requests. Those that two instances share are one line."""
    iterations = _in_time(
        [_with_instance(part.iterations, number) for number, part in parts.items()],
        [np.maximum.accumulate(part.iterations["launch_s"]) for part in parts.values()],
    )
    events = _in_time(
        [
            {
                **_with_instance(part.events, number),
                "request_id": [named[number].get(own, own) for own in part.events["request_id"]],
            }
            for number, part in parts.items()
        ],
        [_moments(part) for part in parts.values()],
    )
    gaps = tuple(np.concatenate([part.itl[i] for part in parts.values()]) for i in (0, 1))
    return RunRecord(meta, _requests(parts, roles, named), iterations, (gaps[0], gaps[1]), events)


def names(parts: Mapping[int, RunRecord], roles: Mapping[int, str]) -> dict[int, dict[str, str]]:
    """Return what requests of instances are called in the record of all, by instance: as they are, but a name that several
    have, for clients give names again and a router sends a request again, has its instance behind it.

    Halves are called by their request and its room (``WHO-ROOM``), on both instances of a pair; a number takes the place of
    the room, where several are called after the same request.
    """
    whole = {number: part.requests["request_id"] for number, part in parts.items() if roles[number] == "both"}
    halves: dict[str, float] = {}
    for part in (part for number, part in parts.items() if roles[number] != "both"):
        for own, at_s in zip(part.requests["request_id"], part.requests["arrival_s"].tolist(), strict=True):
            halves[own] = min(at_s, halves.get(own, at_s))
    often = Counter([name for own in whole.values() for name in own] + [_who(own) for own in halves])
    taken = {name for name, count in often.items() if count == 1}
    found: dict[int, dict[str, str]] = {}
    for number, own in whole.items():
        found[number] = {name: name if name in taken else _free(f"{name}@{number}", "'", taken) for name in own}
    called: dict[str, str] = {}
    count: Counter[str] = Counter()
    for own in sorted(halves, key=lambda own: (halves[own], own)):
        who = _who(own)
        called[own] = who
        while often[who] > 1 and called[own] in {who, *taken}:
            count[who] += 1
            called[own] = f"{who}-{count[who]}"
        taken.add(called[own])
    return found | {number: called for number in parts if roles[number] != "both"}


def _who(half: str) -> str:
    """What a half is called after."""
    return half.rpartition("-")[0]


def _free(name: str, mark: str, taken: set[str]) -> str:
    """A name that nobody has, this one with as many marks as that takes; it is taken from now on."""
    while name in taken:
        name += mark
    taken.add(name)
    return name


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
        columns["arrival_s"][i] = min(columns["arrival_s"][i], other["arrival_s"][place])
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


def merge_traces(
    parts: Mapping[int, Path], named: Mapping[int, Mapping[str, str]], arrivals_s: Mapping[str, float], out: Path
) -> int:
    """Write the trace of all traffic, its first request at 0, and return how many requests it has. ``arrivals_s`` are those
    of the record, by the names there."""
    decode, encode = msgspec.json.Decoder(dict[str, Any]).decode, msgspec.json.Encoder().encode
    places: list[tuple[float, int, int]] = []
    with ExitStack() as stack, out.open("wb") as file:
        opened = {number: stack.enter_context(path.open("rb")) for number, path in parts.items()}
        for number, lines in opened.items():
            at = 0
            for text in lines:
                own = decode(text)["request_id"]
                places.append((arrivals_s[named[number][own]], number, at))
                at += len(text)
        places.sort()
        for arrival_s, number, at in places:
            opened[number].seek(at)
            line = decode(opened[number].readline())
            line["arrival_s"] = round(arrival_s - places[0][0], 6)
            line["request_id"] = named[number][line["request_id"]]
            file.write(encode(line) + b"\n")
    return len(places)
