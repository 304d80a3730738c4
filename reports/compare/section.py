"""A comparison of two runs in words: rows and sentences for the terminal, a section of the page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reports.compare.comparison import LATENCIES, Comparison
from reports.metrics.labels import Unit, percent, written

LABELS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "queue": "Queueing"}
COLUMNS = ("mean of A", "error", "p50", "p90", "p99", "each, mean", "median", "signed")
MOST_DOTS = 2000
"""Requests drawn in one chart; of more, every n-th in the order of A's latency."""
_WIDTH, _HEIGHT = 260.0, 220.0
_LEFT, _BOTTOM, _EDGE = 8.0, 22.0, 6.0


def error_rows(found: Comparison) -> list[list[str]]:
    """One row a latency: its name, then the texts under :data:`COLUMNS`."""
    rows = []
    for name in LATENCIES:
        error = found.latencies.get(name)
        if error is None:
            continue
        signed = (error.mean, *error.percentiles.values())
        rows.append(
            [
                LABELS[name],
                written([error.reference_mean_s], Unit.SECONDS)[0],
                *(_share(value, True) for value in signed),
                _share(error.absolute_mean),
                _share(error.absolute_median),
                _share(error.signed_mean, True),
            ]
        )
    return rows


def sentences(found: Comparison) -> list[str]:
    """The rest of what was found, notes excepted."""
    longer = found.duration_b_s / found.duration_a_s - 1 if found.duration_a_s > 0 else None
    said = [
        f"duration {found.duration_a_s:.2f} s and {found.duration_b_s:.2f} s ({_share(longer, True)}); "
        f"output tokens/s over time differ by {_share(found.throughput_error)} on average"
    ]
    decisions = found.decisions
    if decisions is not None and decisions["equal"]:
        said.append(f"decisions: the same in all {decisions['batches']:,} batches")
    elif decisions is not None:
        what = ", ".join(decisions["differs_in"])
        said.append(f"decisions part at batch {decisions['batch']:,} of instance {decisions['instance']}: {what}")
    return [*said, *found.budget.get("lines", ())]


def section(found: Comparison) -> dict[str, Any]:
    """Collect what the template draws."""
    return {
        "a": found.a,
        "b": found.b,
        "requests": f"{found.requests:,}",
        "latency_from": found.latency_from,
        "columns": COLUMNS,
        "rows": error_rows(found),
        "sentences": sentences(found),
        "notes": found.notes,
        "charts": [_chart(LABELS[name], *found.pairs[name]) for name in LATENCIES if name in found.pairs],
    }


def _share(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else percent(value, signed=signed)


def _chart(label: str, a_s: np.ndarray, b_s: np.ndarray) -> dict[str, Any]:
    """A dot for each request, A's seconds to the right and B's upwards, on one scale; on the diagonal they are equal."""
    order = np.argsort(a_s, kind="stable")
    order = order[:: max(1, math.ceil(len(order) / MOST_DOTS))]
    a_s, b_s = a_s[order], b_s[order]
    low, high = float(min(a_s.min(), b_s.min())), float(max(a_s.max(), b_s.max()))
    logarithmic = low > 0 and high / low > 30
    if not logarithmic:
        low = min(low, 0.0)
    high = high if high > low else low + 1.0

    def along(seconds: np.ndarray) -> np.ndarray:
        if logarithmic:
            return np.log(seconds / low) / math.log(high / low)
        return (seconds - low) / (high - low)

    x = _LEFT + along(a_s) * (_WIDTH - _LEFT - _EDGE)
    y = (_HEIGHT - _BOTTOM) - along(b_s) * (_HEIGHT - _BOTTOM - _EDGE)
    within = float(np.mean(abs(b_s - a_s) <= 0.1 * a_s))
    texts = written([low, high], Unit.SECONDS)
    return {
        "label": label,
        "scale": "logarithmic" if logarithmic else "linear",
        "dots": "".join(f"M{across:.1f} {up:.1f}h0" for across, up in zip(x.tolist(), y.tolist(), strict=True)),
        "shown": f"{len(a_s):,}",
        "low": texts[0],
        "high": texts[1],
        "within": percent(within),
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _EDGE,
        "floor": _HEIGHT - _BOTTOM,
        "top": _EDGE,
    }
