"""The HTML report: one file that holds everything it needs, for people who did not make the runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.errors import RecordError
from reports.labels import Summaries, Unit, best_of, difference, percent, shown_metrics, values_of, written
from reports.metrics import summarise
from reports.out_folder import partial_folder
from reports.record import RunRecord
from reports.schema import HOST_PHASES, MODES
from reports.series import latency_cdfs, over_time
from reports.settings import compare_settings, notes
from reports.timeline import Window, busiest_windows
from reports.verdict import verdict

MOST_BYTES = 2_000_000
_HERE = Path(__file__).parent
_ASSETS = ("vendor/uplot/uPlot.min.css", "report.css", "vendor/uplot/uPlot.iife.min.js", "report.js")


def write_report(
    records: Mapping[str, RunRecord],
    path: str | Path,
    title: str,
    command: str,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
) -> None:
    """Write the page that compares `records` (by the name to show) to the file `path`.

    `command` is what reproduces the runs. The SLO is that of `summarise`. The bytes depend on the arguments alone.

    Raises `RecordError` without a record, or when the page would be larger than 2 MB.
    """
    path = Path(path)
    if not records:
        raise RecordError(f"{path}: no run to report on")
    summaries = {name: summarise(record, slo_ttft_s, slo_tpot_s) for name, record in records.items()}
    text = page_html(records, summaries, title, command)
    if len(text.encode()) > MOST_BYTES:
        raise RecordError(f"{path}: the page of {len(records)} runs would be larger than 2 MB: compare fewer")
    partial = partial_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as problem:
        raise RecordError(f"{path}: cannot be written: {problem.strerror or problem}") from problem


def page_html(records: Mapping[str, RunRecord], summaries: Summaries, title: str, command: str) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_packaged("templates/report.html"))
    differing, shared = compare_settings(records)
    times = over_time(records)
    first = next(iter(records.values()))
    return template.render(
        title=title,
        command=command,
        runs=list(records),
        facts=_facts(first),
        verdict=verdict(summaries),
        metrics=_metric_rows(summaries),
        windows=_drawn(busiest_windows(records)),
        modes=MODES,
        phases=[phase.removesuffix("_s").removesuffix("_host") for phase in HOST_PHASES],
        differing=differing,
        shared=shared,
        notes=notes(records),
        bucket=written([times["bucket_s"]], Unit.SECONDS)[0],
        assets={name.rsplit("/", 1)[-1]: _packaged(f"assets/{name}") for name in _ASSETS},
        data=_embedded({"runs": list(records), "cdfs": latency_cdfs(records), "time": times}),
    )


def _packaged(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can be taken for a tag."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What the runs are about, for the line under the title."""
    trace = record.meta.get("trace")
    name = trace.get("name") if isinstance(trace, Mapping) else trace
    facts = (("Trace", name), ("Model", record.meta.get("model")), ("Hardware", record.meta.get("hardware")))
    return [(label, _named(value)) for label, value in facts if value]


def _named(value: Any) -> str:
    """A model or a GPU may be a name or a description that holds one."""
    if isinstance(value, Mapping):
        return str(value.get("name") or ", ".join(f"{key} {inner}" for key, inner in value.items()))
    return str(value)


def _metric_rows(summaries: Summaries) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for title, metrics in shown_metrics(summaries).items():
        groups[title] = []
        for metric in metrics:
            values = values_of(metric, summaries)
            cells = [
                {"text": text, "best": best, "difference": percent(difference(value, values[0]), signed=True)}
                for value, text, best in zip(
                    values, written(values, metric.unit), best_of(metric, summaries), strict=True
                )
            ]
            groups[title].append({"label": metric.label, "name": metric.name, "cells": cells})
    return groups


def _drawn(windows: Mapping[str, Window]) -> list[dict[str, Any]]:
    """Bars as percentages of their window's length, which is what a lane of any width can draw."""
    drawn = []
    for name, window in windows.items():
        scale = 100 / (window.end_s - window.begin_s)
        lanes = []
        for lane, bars in window.lanes.items():
            boxes = []
            for bar in bars:
                begin_s, end_s = max(bar.begin_s, window.begin_s), min(bar.end_s, window.end_s)
                lasts = written([bar.end_s - bar.begin_s], Unit.SECONDS)[0]
                boxes.append(
                    {
                        "kind": bar.kind,
                        "x": f"{(begin_s - window.begin_s) * scale:.3f}",
                        "width": f"{(end_s - begin_s) * scale:.3f}",
                        "text": f"{bar.text}, {lasts}",
                    }
                )
            lanes.append({"name": lane, "boxes": boxes})
        ticks_s = [(window.end_s - window.begin_s) * share for share in (0, 0.25, 0.5, 0.75, 1)]
        drawn.append(
            {
                "name": name,
                "instance": window.instance,
                "begin": f"{window.begin_s:,.6f} s",
                "lanes": lanes,
                "ticks": ["0", *written(list(ticks_s), Unit.SECONDS)[1:]],
            }
        )
    return drawn
