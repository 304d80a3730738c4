"""How sure a run's predictions are: where the real values would be, by how far off predictions like it were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.metrics.labels import METRICS, Summaries, percent, written
from reports.record.run_record import RunRecord

RANGED = {
    "ttft_mean_s": "ttft",
    "tpot_mean_s": "tpot",
    "e2e_mean_s": "e2e",
    "output_throughput": "throughput",
}
"""Metrics that have a range, and whose band it is by: what was measured were means."""
LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "throughput": "throughput"}
RESTS = {"steps": "step times", "host": "host", "links": "links"}
"""Parts of ``rests_on``, in words."""
PERCENTILES = "10th to 90th percentile"


@dataclass(frozen=True)
class Band:
    """The 10th to 90th percentile of signed errors, (predicted - measured) / measured, of ``rows`` like a run."""

    low: float
    high: float
    rows: int
    group: str
    """What they have in common."""

    def real(self, predicted: float) -> tuple[float, float]:
        """Where a real value would be: what was predicted of it holds the error."""
        return predicted / (1 + self.high), predicted / (1 + self.low)


def bands_of(meta: Mapping[str, Any], part: str = "bands") -> dict[str, Band]:
    """The bands that a record has, by measure; none where it has none, as of earlier versions and of real runs."""
    accuracy = meta.get("accuracy")
    found = accuracy.get(part) if isinstance(accuracy, Mapping) else None
    return {
        name: Band(float(of["low"]), float(of["high"]), int(of["rows"]), str(of["group"]))
        for name, of in (found or {}).items()
        if name in LABELS
    }


def ranges(record: RunRecord, summary: Mapping[str, float | int | None]) -> dict[str, tuple[float, float]]:
    """Where a run's real values would be, by metric. Throughput has no range where arrivals decide what it is: requests come
    when the trace says, however fast they are served."""
    bands = bands_of(record.meta)
    return {
        metric: bands[measure].real(value)
        for metric, measure in RANGED.items()
        if measure in bands
        and (value := summary.get(metric)) is not None
        and (measure != "throughput" or _closed_loop(record))
    }


def _closed_loop(record: RunRecord) -> bool:
    return (record.meta.get("settings") or {}).get("concurrency") is not None


def range_rows(records: Mapping[str, RunRecord], summaries: Summaries) -> dict[str, list[str]]:
    """Ranges as a table has them: the name of a metric, and a text for each run; rows without any are left out."""
    found = {name: ranges(record, summaries[name]) for name, record in records.items()}
    rows = {}
    for metric in RANGED:
        cells = [_range_text(metric, of.get(metric)) for of in found.values()]
        if any(cells):
            rows[METRICS[metric].label] = cells
    return rows


def _range_text(metric: str, limits: tuple[float, float] | None) -> str:
    if limits is None:
        return ""
    low, high = written(list(limits), METRICS[metric].unit)
    unit = low.rpartition(" ")[2]
    return f"{low.removesuffix(unit).strip() if high.endswith(unit) else low} to {high}"


def accuracy_lines(records: Mapping[str, RunRecord]) -> list[str]:
    """Say how sure simulated runs are and what their times rest on, each sentence once, with the runs that it is of where
    that is not all."""
    return [
        line
        for said_by in (_sure, _rests)
        for line in each_once({name: said_by(record.meta) for name, record in records.items()}, ", ".join)
    ]


def each_once(said: Mapping[str, Sequence[str]], named: Callable[[Sequence[str]], str]) -> list[str]:
    """Sentences of several runs, each once, with the runs that it is of, as they are ``named``, where that is not all."""
    found: dict[str, dict[str, None]] = {}
    for name, lines in said.items():
        for line in lines:
            found.setdefault(line, {})[name] = None
    return [line if len(of) == len(said) else f"{named(list(of))}: {line}" for line, of in found.items()]


def sure_lines(meta: Mapping[str, Any]) -> list[str]:
    """Say of one run, by what its meta.json has, how sure it is and what its times rest on."""
    return [*_sure(meta), *_rests(meta)]


def _parts(meta: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What a record says under a key of the run, or of its pools, each with a beginning of its line."""
    if isinstance(meta.get(key), Mapping):
        return [("", meta)]
    pools = [pool for pool in meta.get("pools") or () if isinstance(pool, Mapping)]
    return [(f"pool {pool.get('name')}: ", pool) for pool in pools if isinstance(pool.get(key), Mapping)]


def _sure(meta: Mapping[str, Any]) -> list[str]:
    return [line for before, of in _parts(meta, "accuracy") for line in _sure_of(of, before)]


def _sure_of(meta: Mapping[str, Any], before: str) -> list[str]:
    accuracy, bands = meta["accuracy"], bands_of(meta)
    if not bands:
        return [f"{before}how sure: {accuracy.get('why', 'not compared with anything measured')}"]
    lines = [f"{before}errors of predictions like this, {PERCENTILES}: {_by_group(bands)}"]
    differences = bands_of(meta, "differences")
    if differences:
        lines.append(
            f"{before}of a difference between two runs like this on the same hardware, where errors in common cancel: "
            f"{_by_group(differences, 'neighbouring loads')}"
        )
    else:
        lines.append(
            f"{before}how far off a difference between two runs is: too few measured rows differ in their load alone to say"
        )
    if unlike := accuracy.get("unlike"):
        lines.append(f"{before}not as what was compared: {', '.join(map(str, unlike))}")
    return lines


def _by_group(bands: Mapping[str, Band], what: str = "rows") -> str:
    """Bands in words, those of the same group together."""
    groups: dict[str, list[str]] = {}
    for measure, band in bands.items():
        text = f"{LABELS[measure]} {percent(band.low, signed=True)} to {percent(band.high, signed=True)}"
        groups.setdefault(f"{band.rows} {what} of {band.group}", []).append(text)
    return "; ".join(f"{', '.join(texts)} ({of})" for of, texts in groups.items())


def _rests(meta: Mapping[str, Any]) -> list[str]:
    return [
        f"{before}{label}: {of['rests_on'][part]}"
        for before, of in _parts(meta, "rests_on")
        for part, label in RESTS.items()
        if part in of["rests_on"]
    ]


def difference_lines(summaries: Summaries, records: Mapping[str, RunRecord], baseline: str) -> list[str]:
    """Say where the real differences from a baseline would be, of runs on the same hardware and with the same layout."""
    lines = []
    base = records[baseline].meta
    for name, record in records.items():
        if name == baseline or not _alike(record.meta, base):
            continue
        bands = bands_of(record.meta, "differences")
        texts = []
        for metric, measure in RANGED.items():
            one, other = summaries[name].get(metric), summaries[baseline].get(metric)
            if measure not in bands or one is None or not other:
                continue
            if measure == "throughput" and not (_closed_loop(record) and _closed_loop(records[baseline])):
                continue
            low, high = (value / other - 1 for value in bands[measure].real(one))
            told = "" if (low > 0) == (high > 0) else ", too little to tell"
            texts.append(
                f"{METRICS[metric].label} {percent(one / other - 1, signed=True)} "
                f"(really {percent(low, signed=True)} to {percent(high, signed=True)}{told})"
            )
        if texts:
            lines.append(f"{name} against {baseline}: {'; '.join(texts)}")
    return lines


def _alike(meta: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two runs have their errors in common: those of the same kind of prediction, of the same model."""
    cases = [each.get("accuracy", {}).get("case") for each in (meta, other)]
    return cases[0] is not None and cases[0] == cases[1] and meta.get("model") == other.get("model")


def accuracy_numbers(record: RunRecord, summary: Mapping[str, float | int | None]) -> dict[str, Any] | None:
    """What JSON has of it: the bands, where real values would be, and what times rest on; None of a record without."""
    keys = {key: record.meta[key] for key in ("accuracy", "rests_on") if key in record.meta}
    if not keys:
        return None
    return {**keys.get("accuracy", {}), "ranges": ranges(record, summary), "rests_on": keys.get("rests_on")}
