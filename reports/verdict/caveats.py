"""Caveats of a comparison, in sentences: different work, different worlds, records with holes."""

from __future__ import annotations

from collections.abc import Mapping

from reports.metrics.cuts import cut_lines
from reports.metrics.labels import Unit, written
from reports.record.first_arrival import first_arrival_s
from reports.record.load import trace_of
from reports.record.run_record import RunRecord

_WORTH_SAYING_S = 1.0
"""A page whose times differ by less from the record's confuses nobody."""


def caveats(records: Mapping[str, RunRecord]) -> list[str]:
    """Collect everything that makes a comparison of `records` less than fair or less than complete."""
    return [*_work(records), *_worlds(records), *_clocks(records), *cut_lines(records), *_holes(records)]


def _work(records: Mapping[str, RunRecord]) -> list[str]:
    names = {trace_of(record)[0] for record in records.values()} - {None}
    hashes = {trace_of(record)[1] for record in records.values()} - {None}
    if len(names) > 1:
        return [
            f"These runs served different traces ({', '.join(sorted(map(str, names)))}): differences are not the runs' own."
        ]
    if len(hashes) > 1:
        return ["These runs served traces of the same name and different content: differences are not the runs' own."]
    loads = {name: _load(record) for name, record in records.items()}
    if len(set(loads.values())) > 1:
        listed = "; ".join(f"{name}: {load or 'as recorded'}" for name, load in loads.items())
        return [f"These runs were given the same trace at different loads ({listed})."]
    served = {name: set(record.requests["request_id"]) for name, record in records.items()}
    first, *others = served
    uneven = [name for name in others if served[name] != served[first]]
    if uneven:
        counts = ", ".join(f"{name} {len(ids):,}" for name, ids in served.items())
        return [f"These runs did not serve the same requests ({counts}): compare with care."]
    return []


def _load(record: RunRecord) -> str:
    settings = record.meta.get("settings") or {}
    names = ("requests", "rate", "speedup", "concurrency")
    return ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)


def _worlds(records: Mapping[str, RunRecord]) -> list[str]:
    real = [name for name, record in records.items() if simulated(record) is False]
    if not real:
        return []
    lines = []
    for name in real:
        wall_s = (records[name].meta.get("totals") or {}).get("wall_s")
        took = f" in {wall_s:,.1f} s" if isinstance(wall_s, int | float) else ""
        lines.append(f"{name} ran on real hardware{took}: its times are measured.")
    if len(real) < len(records):
        lines.append(f"The others are simulated: {', '.join(name for name in records if name not in real)}.")
    return lines


def _clocks(records: Mapping[str, RunRecord]) -> list[str]:
    lines = []
    for name, record in records.items():
        if (first_s := first_arrival_s(record)) >= _WORTH_SAYING_S:
            shown = written([first_s], Unit.SECONDS)[0]
            lines.append(f"{name}'s clock stood at {shown} when its first request came: times here count from there.")
    return lines


def simulated(record: RunRecord) -> bool | None:
    """Tell whether the hardware was modelled; None where the record does not say."""
    hardware = record.meta.get("hardware")
    said = hardware.get("simulated") if isinstance(hardware, Mapping) else None
    return said if isinstance(said, bool) else None


def _holes(records: Mapping[str, RunRecord]) -> list[str]:
    lines = []
    for name, record in records.items():
        if record.meta.get("interrupted"):
            lines.append(f"{name} was interrupted: the record holds what was done until then.")
        if not len(record.iterations["iteration"]):
            lines.append(
                f"{name} has no iterations: nothing is known of its batches, its GPU or its CPU, only of its requests."
            )
        elif not record.events["request_id"]:
            lines.append(
                f"{name} has no events: its requests' prefill is drawn in one piece, retractions are only counted."
            )
        if not len(record.itl[0]) and (record.requests["output_tokens"] > 1).any():
            lines.append(f"{name} has no gaps between tokens: no ITL.")
    return lines
