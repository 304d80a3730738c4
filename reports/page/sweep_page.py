"""The page of a sweep: one file with everything in it, made from the rows of results.csv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ground.whole_file import write_whole
from reports.metrics.labels import Metric, percent, written
from reports.metrics.sweep_metrics import SWEEP_METRICS, compared
from reports.page.html_file import asset, embedded, rendered
from reports.record.errors import RecordError

Row = Mapping[str, Any]

MOST_BYTES = 8_000_000
TABLE = (
    "gpus",
    "cost_per_hour",
    "request_throughput",
    "output_throughput",
    "output_throughput_per_gpu",
    "goodput_share",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p99_s",
    "cost_per_million_output_tokens",
    "gpu_busy_share",
    "cache_hit_rate",
    "retractions",
)
"""Metrics that the table shows at first."""
MATTERS = 0.10
"""A setting that explains less of a metric's variance is not worth a sentence."""


def write_sweep_page(
    rows: Sequence[Row],
    manifest: Mapping[str, Any],
    path: str | Path,
    command_of: Callable[[Row], str],
    sure: Sequence[str] = (),
) -> None:
    """Write the page of a sweep to the file `path`.

    `rows` are those of results.csv, `manifest` that of sweep.json (`trace`, `space`, `settings`, `objective`, `search`,
    `command` are shown), `command_of` says how a finished row is run again, `sure` how sure the best are. The bytes depend
    on the arguments alone.

    Raises RecordError when the page cannot be written or would be larger than 8 MB.
    """
    path = Path(path)
    text = sweep_page_html(rows, manifest, command_of, sure)
    if len(text.encode()) > MOST_BYTES:
        raise RecordError(f"{path}: the page of {len(rows)} points would be larger than 8 MB; results.csv has them all")
    write_whole(path, text, RecordError)


def sweep_page_html(
    rows: Sequence[Row], manifest: Mapping[str, Any], command_of: Callable[[Row], str], sure: Sequence[str] = ()
) -> str:
    """The page as text."""
    names = [dimension["name"] for dimension in manifest["space"]]
    finished = sorted(compared(rows), key=lambda row: row["point"])
    shown = {row["point"] for row in finished}
    # What is compared although it could not serve everything stands in both tables: the reason is to be seen.
    others = sorted((r for r in rows if r["point"] not in shown or r["status"] != "finished"), key=lambda r: r["point"])
    metrics = [metric for name, metric in SWEEP_METRICS.items() if any(row[name] is not None for row in finished)]
    objectives = [objective.partition(":")[2] for objective in manifest["objective"]]
    data = {
        "axes": [_axis(dimension) for dimension in manifest["space"]],
        "metrics": [
            {"name": m.name, "label": m.label, "unit": m.unit.value, "better": m.better.value} for m in metrics
        ],
        "objectives": objectives,
        "telling": _telling(finished, names, objectives[0]),
        "table": list(dict.fromkeys([*objectives, *TABLE])),
        "rows": [
            {
                "point": row["point"],
                "s": [row[name] for name in names],
                "m": [_nine_digits(row[metric.name]) for metric in metrics],
                "command": command_of(row),
            }
            for row in finished
        ],
    }
    trace = manifest["trace"]["name"]
    return rendered(
        "sweep.html",
        style=asset("search.css"),
        script=asset("sweep.js"),
        title=f"Sweep of {trace} over {', '.join(names)}",
        facts=_facts(rows, manifest),
        findings=findings(rows, manifest),
        charts=bool(finished),
        names=names,
        others=[
            {"point": r["point"], "status": r["status"], "reason": r["reason"], "settings": [said(r[n]) for n in names]}
            for r in others
        ],
        notes=[*sure, *(manifest["trace"].get("notes") or [])],
        command=manifest["command"],
        space=[(dimension["name"], _dimension_text(dimension)) for dimension in manifest["space"]],
        shared=sorted((name, said(value)) for name, value in _shared(names, finished, manifest).items()),
        data=embedded(data),
    )


def findings(rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[str]:
    """Sentences: the best point of every objective, what each setting does to it, and what did not run."""
    names = [dimension["name"] for dimension in manifest["space"]]
    finished = compared(rows)
    lines = []
    for objective in manifest["objective"]:
        way, _, name = objective.partition(":")
        metric = SWEEP_METRICS[name]
        known = sorted((row for row in finished if row[name] is not None), key=lambda row: (row[name], row["point"]))
        if not known:
            lines.append(f"No finished point has a {metric.label}.")
            continue
        best, worst = (known[-1], known[0]) if way == "max" else (known[0], known[-1])
        word = "Highest" if way == "max" else "Lowest"
        line = (
            f"{word} {metric.label}: {_one(metric, best[name])} with {_settings(best, names)} (point {best['point']})"
        )
        if worst[name] != best[name]:
            line += f"; the {'lowest' if way == 'max' else 'highest'} is {_one(metric, worst[name])}"
        lines.append(line + ".")
        effects = main_effects(known, names, name)
        told = [f"{setting} explains {percent(share)}" for setting, share in effects if share >= MATTERS]
        if told:
            lines.append(f"Of the differences in {metric.label}, {', '.join(told)}.")
    if finished and finished[0]["status"] != "finished":
        lost, total = finished[0]["requests_rejected"], finished[0]["requests_total"]
        lines.append(
            f"No point could serve every request: compared are those that served the most, all but {lost:,} of {total:,}."
        )
    if cut := sum(bool(row.get("requests_cut")) for row in finished):
        lines.append(
            f"{cut} of {len(finished)} points cut outputs short (requests_cut, cut_tokens in results.csv): their load was "
            "lighter than the trace's."
        )
    shown = {row["point"] for row in finished}
    counts = Counter(str(row["status"]) for row in rows if row["point"] not in shown)
    if counts:
        lines.append(
            f"{sum(counts.values())} of {len(rows)} points have no numbers to compare: "
            + ", ".join(f"{number} {status}" for status, number in counts.items())
            + "; the reasons are below."
        )
    return lines


def main_effects(rows: Sequence[Row], names: Sequence[str], metric: str) -> list[tuple[str, float]]:
    """Each setting with the share of a metric's variance that lies between its values' means, the largest first.

    Settings with as many values as there are points explain everything and nothing: they are left out.
    """
    values = np.array([row[metric] for row in rows], dtype=float)
    total = float(values.var())
    if total <= 0 or len(rows) < 4:
        return []
    effects = []
    for name in names:
        groups: dict[str, list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            groups.setdefault(said(row[name]), []).append(float(value))
        if not 1 < len(groups) <= len(rows) / 2:
            continue
        between = sum(len(group) * (np.mean(group) - values.mean()) ** 2 for group in groups.values()) / len(rows)
        effects.append((name, float(between) / total))
    return sorted(effects, key=lambda effect: -effect[1])


def _telling(finished: Sequence[Row], names: Sequence[str], metric: str) -> list[str]:
    """All varied settings, those that explain most of a metric first: what the charts show before anybody chooses."""
    known = [row for row in finished if row[metric] is not None]
    first = [name for name, _ in main_effects(known, names, metric)] if known else []
    return list(dict.fromkeys([*first, *names]))


def _axis(dimension: Mapping[str, Any]) -> dict[str, Any]:
    if "values" in dimension:
        return {"name": dimension["name"], "values": dimension["values"]}
    return {"name": dimension["name"], "log": dimension["log"]}


def _facts(rows: Sequence[Row], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = Counter(str(row["status"]) for row in rows)
    finished = compared(rows)
    facts = [("Trace", str(manifest["trace"]["name"]))]
    for label, name in (("Model", "model"), ("GPU", "gpu")):
        found = sorted({str(row[name]) for row in finished})
        if found:
            facts.append((label, ", ".join(found) if len(found) < 5 else f"{len(found)} of them"))
    facts.append(("Search", str(manifest["search"])))
    facts.append(("Points", ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "none"))
    return facts


def _shared(names: Sequence[str], finished: Sequence[Row], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the runs that are not varied; of none that finished, those that were given."""
    if not finished:
        return dict(manifest["settings"])
    known = [name for name in finished[0] if name not in SWEEP_METRICS and name not in ("point", "status", "reason")]
    return {name: finished[0][name] for name in known if name not in names}


def _dimension_text(dimension: Mapping[str, Any]) -> str:
    if "values" in dimension:
        return ", ".join(said(value) for value in dimension["values"])
    steps = f", {dimension['count']} steps" if dimension["count"] else ""
    return f"{dimension['low']:g} to {dimension['high']:g}{steps}{', logarithmic' if dimension['log'] else ''}"


def _settings(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {said(row[name])}" for name in names)


def said(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(said, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _one(metric: Metric, value: float) -> str:
    return written([value], metric.unit)[0]


def _nine_digits(value: float | int | None) -> float | int | None:
    return float(f"{value:.9g}") if isinstance(value, float) else value
