"""The HTML report: one file that holds everything it needs, for people who did not make the runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ground.whole_file import write_whole
from reports.compare.comparison import Comparison
from reports.compare.differing_settings import compare_settings, notes
from reports.compare.section import section
from reports.metrics.coming_and_going import counts_over_time, fleet_numbers, fleet_spans
from reports.metrics.handovers import STAGE_LABELS, first_tokens
from reports.metrics.host_lane import PHASES
from reports.metrics.how_sure import accuracy_lines, difference_lines, range_rows
from reports.metrics.instances import pools_of, stages_each
from reports.metrics.labels import (
    Unit,
    best_of,
    difference,
    front_end_label,
    percent,
    shown_metrics,
    values_of,
    weights_label,
    written,
)
from reports.metrics.pool_use import pool_table
from reports.metrics.report_numbers import Report, make_report
from reports.metrics.summary import run_window
from reports.metrics.time_use import CAUSE_LABELS, CAUSES, TimeUse, time_use
from reports.page.html_file import asset, embedded, rendered
from reports.record.errors import RecordError
from reports.record.first_arrival import from_first_arrival
from reports.record.load import trace_of
from reports.record.out_folder import PAGE_MARK
from reports.record.run_record import RunRecord
from reports.record.schema import HOST_PHASES, MODES
from reports.timeline.detail import timeline_detail
from reports.timeline.packed import packed_floats
from reports.timeline.series import latency_cdfs, over_time
from reports.timeline.waterfall import request_details
from reports.timeline.windows import busiest_windows
from reports.verdict.caveats import caveats, simulated
from reports.verdict.verdict import headlines, outcome, reasons

MOST_BYTES = 2_000_000
_TIMELINE_BYTES = 1_000_000
"""Size of all timelines together, at first; less when the page turns out too large."""
_REQUEST_BYTES = 350_000
_TRIES = 4
_STYLES = ("vendor/uplot/uPlot.min.css", "report.css")
_SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    "core.js",
    "table.js",
    "timeline.js",
    "charts.js",
    "waterfall.js",
    "start.js",
)


def write_report(
    records: Mapping[str, RunRecord],
    path: str | Path,
    title: str,
    command: str,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    baseline: str | None = None,
    comparison: Comparison | None = None,
) -> Report:
    """Write the page that compares `records` (by the name to show) to the file `path`, and return what it says.

    `command` is what reproduces the runs, for those that do not say so themselves; `comparison`, of the two runs, gets a
    part of its own. The bytes depend on the arguments alone.

    Raises `RecordError` without a record, when the page would be larger than 2 MB, and when `path` is a file that is no page
    of ours.
    """
    path = Path(path)
    if not records:
        raise RecordError(f"{path}: no run to report on")
    report = make_report(records, slo_ttft_s, slo_tpot_s, baseline)
    _spare_strangers(path)
    text = page_html(report, title, command, comparison)
    if len(text.encode()) > MOST_BYTES:
        raise RecordError(f"{path}: the page of {len(records)} runs would be larger than 2 MB: compare fewer")
    write_whole(path, text, RecordError)
    return report


def _spare_strangers(path: Path) -> None:
    if path.is_dir():
        raise RecordError(f"{path}: is a folder; name a file")
    if path.is_file():
        with path.open("rb") as file:
            if PAGE_MARK not in file.read(1024):
                raise RecordError(f"{path}: exists and is no page of workbench")


def title_of(records: Mapping[str, RunRecord]) -> str:
    """Trace, model and hardware, as far as the runs share them."""
    models = list(dict.fromkeys(_named(record.meta.get("model")) for record in records.values()))
    traces = list(dict.fromkeys(trace_of(record)[0] or "a trace" for record in records.values()))
    chips = list(dict.fromkeys(_chip(record) for record in records.values()))
    on = f" on {chips[0]}" if len(chips) == 1 and chips[0] else ""
    return f"{' / '.join(traces)}: {' / '.join(models)}{on}"


def _chip(record: RunRecord) -> str:
    hardware = record.meta.get("hardware")
    if isinstance(hardware, Mapping):
        return str(hardware.get("gpu") or hardware.get("name") or "")
    return _named(hardware)


def page_html(report: Report, title: str, command: str = "", comparison: Comparison | None = None) -> str:
    """The page as text: its timelines cut down until it fits into 2 MB, if they can be."""
    budget_bytes = _TIMELINE_BYTES
    text = ""
    for _ in range(_TRIES):
        text = _rendered(report, title, command, comparison, budget_bytes)
        excess = len(text.encode()) - MOST_BYTES
        if excess <= 0:
            break
        budget_bytes = max(budget_bytes - excess - 20_000, 4_000 * len(report.records))
    return text


def _rendered(report: Report, title: str, command: str, comparison: Comparison | None, timeline_bytes: int) -> str:
    records = {name: from_first_arrival(record) for name, record in report.records.items()}
    # Half of the timelines' time is packing, which another core can do.
    with ThreadPoolExecutor(1) as other:
        packing = other.submit(_timelines, records, timeline_bytes // len(records))
        differing, shared = compare_settings(records)
        times = over_time(records)
        windows = busiest_windows(records)
        cdfs = {name: _packed_cdf(chart, list(records)) for name, chart in latency_cdfs(records).items()}
        requests = request_details(records, _REQUEST_BYTES)
        details = packing.result()
    data = {
        "runs": list(records),
        "cdfs": cdfs,
        "time": _packed_times(times, list(records)),
        "time_last": [times["last"].get(name, 0) for name in records],
        "timeline": details,
        "busiest": {name: [window.begin_s, window.end_s] for name, window in windows.items()},
        "requests": requests,
    }
    uses = _use_rows(report)
    pool_columns, pools = pool_table(records)
    # A key names what there is to see.
    kinds = {part["kind"] for use in uses for part in use["parts"]}
    return rendered(
        "report.html",
        title=title,
        commands=_commands(records, command),
        runs=list(records),
        baseline=report.baseline,
        facts=_facts(records),
        caveats=caveats(report.records),
        headlines=headlines(report.summaries, report.baseline),
        outcome=outcome(report.summaries),
        reasons=reasons(report.summaries, report.uses, report.records),
        uses=uses,
        first_tokens=_first_token_rows(report),
        first_token_stages=STAGE_LABELS,
        comparison=section(comparison) if comparison is not None else None,
        causes={cause: label for cause, label in CAUSE_LABELS.items() if f"idle-{cause}" in kinds},
        metrics=_metric_rows(report),
        ranges=range_rows(records, report.summaries),
        sure=[*difference_lines(report.summaries, records, report.baseline), *accuracy_lines(records)],
        pools=pools,
        fleets=_fleet_charts(records),
        currency=" / ".join(dict.fromkeys(_currency(record) for record in records.values() if _currency(record))),
        several_instances=any(len(stages_each(record)) > 1 for record in records.values()),
        pool_columns=pool_columns,
        has_timeline=any(detail is not None for detail in details.values()),
        modes=[mode for mode in MODES if mode in kinds],
        phases=[
            phase
            for phase, column in zip(PHASES, HOST_PHASES, strict=True)
            if any(record.iterations[column].any() for record in records.values())
        ],
        retracted=any(record.requests["retractions"].any() for record in records.values()),
        differing=differing,
        shared=shared,
        notes=notes(records),
        bucket=written([times["bucket_s"]], Unit.SECONDS)[0],
        styles=[asset(name) for name in _STYLES],
        scripts=[asset(name) for name in _SCRIPTS],
        data=embedded(data),
    )


def _timelines(records: Mapping[str, RunRecord], budget_bytes: int) -> dict[str, Any]:
    return {name: timeline_detail(record, budget_bytes) for name, record in records.items()}


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _packed_cdf(chart: Mapping[str, Any], runs: list[str]) -> dict[str, Any]:
    columns = {str(place): _floats(chart["runs"][run]) for place, run in enumerate(runs)}
    return packed_floats({"x": _floats(chart["x"]), **columns})


def _packed_times(times: Mapping[str, Any], runs: list[str]) -> dict[str, Any]:
    columns = {"t": _floats(times["t"])}
    for place, run in enumerate(runs):
        for name, values in times["runs"].get(run, {}).items():
            columns[f"{place}.{name}"] = _floats(values)
    return packed_floats(columns)


def _commands(records: Mapping[str, RunRecord], command: str) -> list[dict[str, Any]]:
    """Each command once, with the runs that it makes."""
    made: dict[str, list[str]] = {}
    for name, record in records.items():
        said = record.meta.get("command") or command
        if said:
            made.setdefault(str(said), []).append(name)
    return [{"text": text, "runs": names} for text, names in made.items()]


def _facts(records: Mapping[str, RunRecord]) -> list[tuple[str, str]]:
    """Say what the runs are about, for the line under the title."""
    facts = []
    for label, found in (
        ("Trace", [trace_of(record)[0] for record in records.values()]),
        ("Requests", [f"{len(record.requests['request_id']):,}" for record in records.values()]),
        ("Model", [_named(record.meta.get("model")) for record in records.values()]),
        ("Weights", [weights_label(record.meta) for record in records.values()]),
        ("Hardware", [_hardware(record) for record in records.values()]),
        ("Latencies", [front_end_label(record.meta) for record in records.values()]),
    ):
        texts = list(dict.fromkeys(text for text in found if text))
        if texts:
            facts.append((label, " / ".join(texts)))
    return facts


def _hardware(record: RunRecord) -> str:
    hardware = record.meta.get("hardware")
    if not isinstance(hardware, Mapping):
        return _named(hardware)
    number = hardware.get("gpus")
    kinds = {pool.gpu for pool in pools_of(record)}
    # Of several kinds the name says how many there are of each.
    times = f"{number} x " if isinstance(number, int) and number > 1 and len(kinds) < 2 else ""
    world = {True: " (simulated)", False: " (real)", None: ""}[simulated(record)]
    return f"{times}{hardware.get('gpu') or hardware.get('name') or 'unknown'}{world}"


def _named(value: Any) -> str:
    """A model or a GPU may be a name or a description that holds one."""
    if isinstance(value, Mapping):
        return str(value.get("name") or ", ".join(f"{key} {inner}" for key, inner in value.items()))
    return "" if value is None else str(value)


def _use_rows(report: Report) -> list[dict[str, Any]]:
    """Per run the parts of its bar: share of GPU time, seconds, what it is."""
    rows = []
    for name, use in report.uses.items():
        if use is None:
            continue
        rows.append(_use_row(name, "", use))
        pools = pools_of(report.records[name])
        for pool in pools if len(pools) > 1 else []:
            of_pool = time_use(report.records[name], pool.numbers)
            if of_pool is not None:
                rows.append(_use_row(name, pool.name, of_pool))
    return rows


def _use_row(name: str, pool: str, use: TimeUse) -> dict[str, Any]:
    """The bar of a run, or of a pool of it."""
    seconds = {**use.busy_s, **{f"idle-{cause}": use.idle_s[cause] for cause in CAUSES}}
    parts = [
        {
            "kind": kind,
            "share": value_s / use.gpu_s,
            "width": f"{value_s / use.gpu_s * 100:.4f}",
            "percent": percent(value_s / use.gpu_s),
            "seconds": f"{value_s:.9f}",
            "text": f"{_kind_label(kind)}: {written([value_s], Unit.SECONDS)[0]}, {percent(value_s / use.gpu_s)}",
        }
        for kind, value_s in seconds.items()
        if value_s > 0
    ]
    hidden = use.hidden_s / use.host_s if use.host_s else 0.0
    return {
        "name": name,
        "pool": pool,
        "parts": parts,
        "gpu": written([use.gpu_s], Unit.SECONDS)[0]
        + (f" of {use.gpus_a_stage} GPUs as one" if use.gpus_a_stage > 1 else " of GPU time"),
        "host": written([use.host_s], Unit.SECONDS)[0],
        "hidden": percent(hidden),
        "hidden_width": f"{hidden * 100:.3f}",
        "host_width": f"{min(use.host_s / use.gpu_s, 1) * 100:.3f}",
        "recomputed": f"{use.recomputed_tokens:,}" if use.recomputed_tokens else "",
        "recomputed_s": written([use.recomputed_s], Unit.SECONDS)[0],
    }


_CHART_WIDTH, _CHART_HEIGHT = 1000, 60


def _currency(record: RunRecord) -> str:
    return str((record.meta.get("prices") or {}).get("currency") or "")


def _fleet_charts(records: Mapping[str, RunRecord]) -> list[dict[str, Any]]:
    """How many instances of each pool could serve over time, as steps to draw, of runs whose instances came and went."""
    charts = []
    for name, record in records.items():
        window = run_window(record)
        if fleet_spans(record) is None or window is None:
            continue
        for pool in pools_of(record):
            counts = counts_over_time(record, pool, window.begin_s, window.end_s)
            numbers = fleet_numbers(record, pool, window.begin_s, window.end_s)
            scale = _CHART_WIDTH / window.duration_s
            path, most = "", max(pool.count, 1)
            for (at_s, number), (to_s, _) in zip(counts, [*counts[1:], (window.end_s, 0)], strict=True):
                high = _CHART_HEIGHT * (1 - number / most)
                path += f"{'L' if path else 'M'}{(at_s - window.begin_s) * scale:.2f} {high:.2f}"
                path += f"H{(to_s - window.begin_s) * scale:.2f}"
            said = [f"{numbers['instances_least']} to {numbers['instances_most']} instances"]
            said += [f"{numbers['instances_mean']:.2f} on the mean", f"{numbers['gpu_hours']:.4g} GPU hours"]
            said += [f"{numbers[what]} {what}" for what in ("started", "lost") if numbers[what]]
            charts.append({"name": name, "pool": pool.name, "path": path, "said": ", ".join(said), "most": most})
    return charts


def _first_token_rows(report: Report) -> list[dict[str, Any]]:
    """Bars of what first tokens waited for, of runs whose requests two instances share: all of them, and the slowest."""
    rows = []
    for name, record in report.records.items():
        found = first_tokens(record)
        if found is None:
            continue
        for which, parts_s in (("mean of all", found.mean_s()), ("slowest tenth", found.slow_s())):
            total_s = max(sum(parts_s.values()), 1e-12)
            texts = dict(zip(parts_s, written(list(parts_s.values()), Unit.SECONDS), strict=True))
            rows.append(
                {
                    "name": name,
                    "which": which,
                    "total": written([total_s], Unit.SECONDS)[0],
                    "parts": [
                        {
                            "stage": stage,
                            "share": part_s / total_s,
                            "width": f"{part_s / total_s * 100:.4f}",
                            "percent": percent(part_s / total_s),
                            "seconds": f"{part_s:.9f}",
                            "text": f"{STAGE_LABELS[stage]}: {texts[stage]}, {percent(part_s / total_s)}",
                        }
                        for stage, part_s in parts_s.items()
                        if part_s > 0
                    ],
                }
            )
    return rows


def _kind_label(kind: str) -> str:
    return f"idle, {CAUSE_LABELS[kind.removeprefix('idle-')]}" if kind.startswith("idle-") else kind


def _metric_rows(report: Report) -> dict[str, list[dict[str, Any]]]:
    numbers = report.numbers
    base = numbers[report.baseline]
    groups: dict[str, list[dict[str, Any]]] = {}
    for title, metrics in shown_metrics(numbers).items():
        groups[title] = []
        for metric in metrics:
            values = values_of(metric, numbers)
            cells = [
                {
                    "text": text,
                    "best": best,
                    "value": "" if value is None else repr(value),
                    "difference": ""
                    if name == report.baseline
                    else percent(difference(value, base.get(metric.name)), signed=True),
                }
                for name, value, text, best in zip(
                    numbers, values, written(values, metric.unit), best_of(metric, numbers), strict=True
                )
            ]
            groups[title].append(
                {"label": metric.label, "name": metric.name, "better": metric.better.value, "cells": cells}
            )
    return groups
