"""Figures of runs for a paper or a slide: one file each, the page's colours, units on every axis.

The same records give the same bytes: no dates, no random ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ground.errors import InputError
from ground.whole_file import partial_path
from reports.metrics.time_use import CAUSE_LABELS, CAUSES
from reports.record.errors import RecordError
from reports.record.first_arrival import from_first_arrival
from reports.record.schema import MODES
from reports.timeline.series import latency_cdfs, over_time
from reports.timeline.windows import Window, busiest_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from reports.metrics.report_numbers import Report

FORMATS = ("png", "svg", "pdf")
RUN_COLOURS = ("#4a54d4", "#cf2f74", "#0b8457", "#a06a00", "#0a7ea8", "#8540c4", "#bf4a1c", "#566575")
KIND_COLOURS = {
    "prefill": "#eb9f3c",
    "decode": "#5a94d6",
    "mixed": "#a284d8",
    "cpu": "#e0616b",
    "kv": "#96694c",
    "bubble": "#45b3a0",
    "none": "#dfe3e8",
    "other": "#aab2bb",
    "peer": "#b8d4d9",
    "off": "#8d95a0",
    "receive": "#c5ccd4",
    "schedule": "#8793a0",
    "launch": "#48545f",
    "process": "#6b9a72",
}
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "savefig.dpi": 200,
    "svg.hashsalt": "workbench",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}
_NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


def write_figures(report: Report, folder: str | Path, file_format: str) -> list[Path]:
    """Draw `latency`, `over_time`, `time_use` and `timeline` into `folder`, those that the records hold something of.

    Raises `RecordError` if a file cannot be written, `InputError` for an unknown format.
    """
    if file_format not in FORMATS:
        raise InputError(f"figures: {file_format!r} is not one of {', '.join(FORMATS)}")
    folder = Path(folder)
    drawings: dict[str, Callable[[Report], Figure | None]] = {
        "latency": latency_figure,
        "over_time": over_time_figure,
        "time_use": time_use_figure,
        "timeline": timeline_figure,
    }
    report = replace(report, records={name: from_first_arrival(record) for name, record in report.records.items()})
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _drawing():
            for name, draw in drawings.items():
                figure = draw(report)
                if figure is None:
                    continue
                path = folder / f"{name}.{file_format}"
                partial = partial_path(path)
                figure.savefig(partial, format=file_format, metadata=_NO_DATE[file_format])
                os.replace(partial, path)
                files.append(path)
    except OSError as problem:
        raise RecordError(f"{folder}: figures cannot be written: {problem.strerror or problem}") from problem
    return files


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.figure import Figure

    # Without pyplot: no window system is asked for, nothing is kept.
    return Figure(figsize=(width_in, height_in))


def _colour(place: int) -> str:
    return RUN_COLOURS[place % len(RUN_COLOURS)]


def _values(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def latency_figure(report: Report) -> Figure:
    """Draw the distributions of TTFT, TPOT, ITL and E2E."""
    figure = _figure(7, 4.4)
    axes = figure.subplots(2, 2)
    titles = {
        "ttft": "Time to first token",
        "tpot": "Time per output token",
        "itl": "Gaps between tokens",
        "e2e": "Arrival to finish",
    }
    for axis, (name, chart) in zip(axes.flat, latency_cdfs(report.records).items(), strict=True):
        x = _values(chart["x"])
        factor, unit = (1e3, "ms") if len(x) and np.nanmedian(x) < 1 else (1, "s")
        for place, (run, shares) in enumerate(chart["runs"].items()):
            axis.step(x * factor, _values(shares), where="post", color=_colour(place), label=run)
        if len(x) > 1 and x[0] > 0 and x[-1] / x[0] > 30:
            axis.set_xscale("log")
        axis.set(
            title=titles[name],
            xlabel=f"{name.upper()} ({unit})",
            ylabel="share of requests" if name != "itl" else "share of gaps",
            ylim=(0, 1),
        )
    axes.flat[0].legend()
    return figure


def over_time_figure(report: Report) -> Figure | None:
    """Draw running, waiting, throughput, KV, hit rate and GPU use over time."""
    times = over_time(report.records)
    at_s = _values(times["t"])
    if not len(at_s):
        return None
    charts = {
        "running": ("Running", "requests"),
        "waiting": ("Waiting", "requests"),
        "decode_tokens": ("Decode", "tokens/s"),
        "prefill_tokens": ("Prefill", "tokens/s"),
        "kv": ("KV in use", "tokens"),
        "hit_rate": ("Cache hits", "share of prompt tokens"),
        "busy": ("GPU busy", "share of time"),
        "batch": ("Batch", "requests a batch"),
    }
    figure = _figure(7, 7.4)
    axes = figure.subplots(4, 2, sharex=True)
    for axis, (name, (title, unit)) in zip(axes.flat, charts.items(), strict=True):
        for place, (run, series) in enumerate(times["runs"].items()):
            values = _values(series[name][: times["last"][run] + 1])
            known = ~np.isnan(values)
            axis.plot(at_s[: len(values)][known], values[known], color=_colour(place), label=run, linewidth=0.8)
        axis.set(title=title, ylabel=unit)
        axis.set_ylim(bottom=0, top=1.02 if unit.startswith("share") else None)
    for axis in axes[-1]:
        axis.set_xlabel("time (s)")
    axes.flat[0].legend()
    return figure


def time_use_figure(report: Report) -> Figure | None:
    """Draw what the time of the GPUs went to, one bar a run."""
    known = {run: use for run, use in report.uses.items() if use is not None}
    if not known:
        return None
    from matplotlib.patches import Patch

    figure = _figure(7, 1.1 + 0.42 * len(known))
    axis = figure.subplots()
    used: dict[str, str] = {}
    for place, use in enumerate(known.values()):
        left = 0.0
        parts = {**use.busy_s, **use.idle_s}
        for kind, seconds in parts.items():
            width = seconds / use.gpu_s * 100
            if not width:
                continue
            axis.barh(place, width, left=left, color=KIND_COLOURS[kind], height=0.68)
            if width > 4:
                axis.text(left + width / 2, place, f"{width:.1f} %", ha="center", va="center", fontsize=7)
            left += width
            used[kind] = kind if kind in MODES else f"idle: {CAUSE_LABELS[kind]}"
    axis.set(yticks=range(len(known)), yticklabels=list(known), xlim=(0, 100), xlabel="share of GPU time (%)")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    order = [kind for kind in (*MODES, *CAUSES) if kind in used]
    figure.legend(
        [Patch(color=KIND_COLOURS[kind]) for kind in order],
        [used[kind] for kind in order],
        loc="outside upper left",
        ncols=4,
    )
    return figure


def timeline_figure(report: Report) -> Figure | None:
    """Draw CPU and GPU lanes of every run at its busiest moment, to one scale."""
    windows = busiest_windows(report.records)
    if not windows:
        return None
    from matplotlib.patches import Patch

    lanes = sum(len(window.lanes) for window in windows.values())
    figure = _figure(7, 0.7 + 0.45 * len(windows) + 0.24 * lanes)
    axes = figure.subplots(
        len(windows), 1, squeeze=False, height_ratios=[len(window.lanes) for window in windows.values()]
    )
    used: dict[str, None] = {}
    for axis, (run, window) in zip(axes[:, 0], windows.items(), strict=True):
        used |= dict.fromkeys(_draw_window(axis, window))
        axis.set_title(f"{run}, from {window.begin_s:.6f} s")
    axes[-1, 0].set_xlabel("time (ms)")
    order = [kind for kind in KIND_COLOURS if kind in used]
    names = [("GPU " if kind in MODES else "CPU ") + kind for kind in order]
    figure.legend([Patch(color=KIND_COLOURS[kind]) for kind in order], names, loc="outside upper left", ncols=7)
    return figure


def _draw_window(axis: Axes, window: Window) -> Mapping[str, None]:
    used: dict[str, None] = {}
    for place, bars in enumerate(window.lanes.values()):
        for kind in dict.fromkeys(bar.kind for bar in bars):
            spans = [
                ((bar.begin_s - window.begin_s) * 1e3, (bar.end_s - bar.begin_s) * 1e3)
                for bar in bars
                if bar.kind == kind
            ]
            axis.broken_barh(spans, (place - 0.4, 0.8), facecolors=KIND_COLOURS[kind], edgecolor="white", linewidth=0.3)
            used[kind] = None
    axis.set(
        yticks=range(len(window.lanes)),
        yticklabels=list(window.lanes),
        xlim=(0, (window.end_s - window.begin_s) * 1e3),
        ylim=(len(window.lanes) - 0.5, -0.5),
    )
    axis.grid(visible=False)
    return used
