"""The metrics of one run of a sweep: those of any run, and the same by GPU and by money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from reports.metrics.coming_and_going import fleet_spans
from reports.metrics.labels import METRICS, Better, Metric, Unit
from reports.metrics.summary import Summary, summarise
from reports.record.run_record import RunRecord

Row = TypeVar("Row", bound=Mapping[str, Any])
PER_GPU = ("request_throughput", "input_throughput", "output_throughput", "total_throughput", "goodput_rps")

SWEEP_METRICS: dict[str, Metric] = {
    "gpus": Metric("gpus", "GPUs", Unit.COUNT, Better.LOWER),
    **METRICS,
    **{
        f"{name}_per_gpu": Metric(f"{name}_per_gpu", f"{METRICS[name].label} a GPU", METRICS[name].unit, Better.HIGHER)
        for name in PER_GPU
    },
    "cost_per_hour": Metric("cost_per_hour", "Cost an hour", Unit.COUNT, Better.LOWER),
}
"""Every metric of a sweep's results, in the order of their columns."""


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of results.csv whose numbers are compared: those of finished points. Where there are none, of points that
    could not serve every request, those that served the most of them: the others had an easier load."""
    finished = [row for row in rows if row["status"] == "finished"]
    if finished:
        return finished
    some = [row for row in rows if row["status"] == "incomplete" and row["requests_rejected"] < row["requests_total"]]
    fewest = min((row["requests_rejected"] for row in some), default=0)
    return [row for row in some if row["requests_rejected"] == fewest]


def sweep_summary(
    record: RunRecord,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    cost_per_hour: float | None = None,
) -> Summary:
    """The columns of `SWEEP_METRICS` for one run, whose GPUs cost so much an hour (None: nobody knows)."""
    summary = summarise(record, slo_ttft_s, slo_tpot_s)
    gpus = int(record.meta["hardware"]["gpus"])
    per_gpu = {f"{name}_per_gpu": _divided(summary[name], gpus) for name in PER_GPU}
    return {
        "gpus": gpus,
        **summary,
        **per_gpu,
        "cost_per_hour": cost_per_hour if fleet_spans(record) is None else _an_hour(summary),
    }


def _divided(value: float | int | None, gpus: int) -> float | None:
    return None if value is None else value / gpus


def _an_hour(summary: Mapping[str, float | int | None]) -> float | None:
    """What the instances that were there cost an hour, on the mean of the run."""
    cost, duration_s = summary["cost"], summary["duration_s"]
    return None if cost is None or not duration_s else cost / duration_s * 3600
