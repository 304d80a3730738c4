"""Names, units and judgement of metrics: shared by the terminal table, the verdict and the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from reports.record.meta import kind_of

Summaries = Mapping[str, Mapping[str, float | int | None]]

UNKNOWN = "-"
"""What is written in place of a number that is not known."""


class Unit(Enum):
    """Unit of a number."""

    COUNT = ""
    SECONDS = "s"
    SHARE = "%"
    REQUESTS_PER_S = "req/s"
    TOKENS_PER_S = "tok/s"
    TOKENS = "tok"
    AMOUNT = "amount"
    """Of any size: four digits, and the label says of what."""


class Better(Enum):
    """Direction in which a metric is better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True)
class Metric:
    """One row of a comparison."""

    name: str  # as in metrics.summarise
    label: str
    unit: Unit
    better: Better = Better.NEITHER


def _spread(name: str, label: str) -> list[Metric]:
    parts = [("mean", "mean"), ("p50", "p50"), ("p90", "p90"), ("p99", "p99")]
    return [Metric(f"{name}_{part}_s", f"{label} {shown}", Unit.SECONDS, Better.LOWER) for part, shown in parts]


GROUPS: dict[str, list[Metric]] = {
    "Requests": [
        Metric("duration_s", "Duration", Unit.SECONDS),
        Metric("requests_total", "Requests", Unit.COUNT),
        Metric("requests_finished", "Finished", Unit.COUNT, Better.HIGHER),
        Metric("requests_aborted", "Aborted", Unit.COUNT, Better.LOWER),
        Metric("requests_rejected", "Rejected", Unit.COUNT, Better.LOWER),
        Metric("requests_unfinished", "Unfinished", Unit.COUNT, Better.LOWER),
        Metric("requests_cut", "Cut short", Unit.COUNT, Better.LOWER),
        Metric("cut_tokens", "Not written", Unit.TOKENS, Better.LOWER),
    ],
    "Throughput": [
        Metric("request_throughput", "Requests", Unit.REQUESTS_PER_S, Better.HIGHER),
        Metric("input_throughput", "Input tokens", Unit.TOKENS_PER_S, Better.HIGHER),
        Metric("output_throughput", "Output tokens", Unit.TOKENS_PER_S, Better.HIGHER),
        Metric("total_throughput", "All tokens", Unit.TOKENS_PER_S, Better.HIGHER),
        Metric("goodput_rps", "Goodput in SLO", Unit.REQUESTS_PER_S, Better.HIGHER),
        Metric("goodput_share", "Share in SLO", Unit.SHARE, Better.HIGHER),
    ],
    "Latency": [
        *_spread("ttft", "TTFT"),
        *_spread("tpot", "TPOT"),
        *_spread("itl", "ITL"),
        *_spread("e2e", "E2E"),
        *_spread("queue", "Queueing"),
    ],
    "Use of time": [
        Metric("gpu_busy_share", "GPU busy", Unit.SHARE, Better.HIGHER),
        Metric("cpu_exposed_share", "CPU exposed", Unit.SHARE, Better.LOWER),
        Metric("bubble_share", "Bubbles", Unit.SHARE, Better.LOWER),
        Metric("no_work_share", "No work", Unit.SHARE),
        Metric("host_cpu_share", "Host CPU", Unit.SHARE, Better.LOWER),
        Metric("gpu_prefill_s", "GPU in prefill", Unit.SECONDS),
        Metric("gpu_decode_s", "GPU in decode", Unit.SECONDS),
        Metric("gpu_mixed_s", "GPU in mixed", Unit.SECONDS),
    ],
    "Where the GPU time went": [
        Metric("busy_prefill_share", "Prefill", Unit.SHARE),
        Metric("busy_decode_share", "Decode", Unit.SHARE),
        Metric("busy_mixed_share", "Mixed", Unit.SHARE),
        Metric("idle_cpu_share", "Idle: for CPU", Unit.SHARE, Better.LOWER),
        Metric("idle_kv_share", "Idle: out of KV", Unit.SHARE, Better.LOWER),
        Metric("idle_bubble_share", "Idle: bubble", Unit.SHARE, Better.LOWER),
        Metric("idle_peer_share", "Idle: other side", Unit.SHARE),
        Metric("idle_off_share", "Idle: not there", Unit.SHARE, Better.LOWER),
        Metric("idle_none_share", "Idle: no work", Unit.SHARE),
        Metric("idle_other_share", "Idle: other", Unit.SHARE),
        Metric("cpu_hidden_share", "CPU hidden", Unit.SHARE, Better.HIGHER),
        Metric("recomputed_tokens", "Recomputed", Unit.TOKENS, Better.LOWER),
    ],
    "Cost and energy": [
        Metric("gpu_hours", "GPU hours", Unit.AMOUNT, Better.LOWER),
        Metric("energy_kwh", "Energy, kWh", Unit.AMOUNT, Better.LOWER),
        Metric("energy_per_output_token_j", "J a token", Unit.AMOUNT, Better.LOWER),
        Metric("cost", "Cost", Unit.AMOUNT, Better.LOWER),
        Metric("cost_per_million_output_tokens", "Cost a M tokens", Unit.AMOUNT, Better.LOWER),
    ],
    "Scheduling": [
        Metric("cache_hit_rate", "Cache hits", Unit.SHARE, Better.HIGHER),
        Metric("retractions", "Retractions", Unit.COUNT, Better.LOWER),
        Metric("iterations", "Iterations", Unit.COUNT),
        Metric("iterations_prefill", "Prefill its.", Unit.COUNT),
        Metric("iterations_decode", "Decode its.", Unit.COUNT),
        Metric("iterations_mixed", "Mixed its.", Unit.COUNT),
        Metric("mean_decode_batch", "Decode batch", Unit.COUNT),
        Metric("peak_kv_used_tokens", "Peak KV", Unit.TOKENS),
        Metric("peak_running", "Peak running", Unit.COUNT),
        Metric("peak_waiting", "Peak waiting", Unit.COUNT),
    ],
}

METRICS = {metric.name: metric for metrics in GROUPS.values() for metric in metrics}

_QUIET_WHEN_ZERO = frozenset(
    {
        "requests_aborted",
        "requests_rejected",
        "requests_unfinished",
        "requests_cut",
        "cut_tokens",
        "gpu_mixed_s",
        "iterations_mixed",
        "iterations_prefill",
        "busy_mixed_share",
        "idle_kv_share",
        "idle_bubble_share",
        "idle_other_share",
        "idle_peer_share",
        "idle_off_share",
        "recomputed_tokens",
    }
)


def shown_metrics(summaries: Summaries) -> dict[str, list[Metric]]:
    """The groups without rows that would say nothing: no value in any run, or nobody aborted, or no mixed batch."""
    groups = {
        title: [metric for metric in metrics if _says_something(metric, values_of(metric, summaries))]
        for title, metrics in GROUPS.items()
    }
    return {title: metrics for title, metrics in groups.items() if metrics}


def _says_something(metric: Metric, values: Iterable[float | int | None]) -> bool:
    known = [value for value in values if value is not None]
    return any(known) if metric.name in _QUIET_WHEN_ZERO else bool(known)


def values_of(metric: Metric, summaries: Summaries) -> list[float | int | None]:
    """The metric in each run, in their order."""
    return [summary.get(metric.name) for summary in summaries.values()]


def best_of(metric: Metric, summaries: Summaries) -> list[bool]:
    """Mark the runs with the best value; none where there is no choice or all are alike."""
    values = values_of(metric, summaries)
    known = [value for value in values if value is not None]
    if metric.better is Better.NEITHER or len(known) < 2 or min(known) == max(known):
        return [False] * len(values)
    best = max(known) if metric.better is Better.HIGHER else min(known)
    return [value == best for value in values]


def weights_label(meta: Mapping[str, Any]) -> str:
    """Say in one clause what a run's weights were held in and who said so, by pool where that is not all the same; empty
    where the record does not say."""
    weights = meta.get("weights")
    if isinstance(weights, Mapping):
        return _held(weights)
    pools = [pool for pool in meta.get("pools") or () if isinstance(pool, Mapping)]
    each = [(pool.get("name"), pool["weights"]) for pool in pools if isinstance(pool.get("weights"), Mapping)]
    return "; ".join(f"{name}: {_held(weights)}" for name, weights in each)


def front_end_label(meta: Mapping[str, Any]) -> str:
    """Say in one clause whether a simulated run's latencies are its engine's own or what clients see of it; empty where the
    record does not say."""
    front_end, settings = meta.get("front_end"), meta.get("settings")
    if isinstance(front_end, Mapping):
        return f"as clients see them, behind the front end of {front_end.get('engine', 'an engine')}"
    if isinstance(settings, Mapping) and settings.get("front_end") == "none" and kind_of(meta) == "simulated":
        return "the engine's own, with no front end before it"
    return ""


def _held(weights: Mapping[str, Any]) -> str:
    dtype, computes, plain = (str(weights.get(name, "")) for name in ("dtype", "computes", "kept_in"))
    parts = [f"computed in {computes}"] if computes and computes != dtype else []
    kept = weights.get("kept")
    if plain and plain != dtype and isinstance(kept, Mapping):
        said = [
            f"{'' if share == 1 else f'{percent(share)} of '}{part.replace('_', ' ')}" for part, share in kept.items()
        ]
        parts += [f"{', '.join(said)} in {plain}"] if said else []
    return ", ".join([f"{dtype} (from {weights.get('said_by', 'unknown')})", *parts])


def difference(value: float | int | None, base: float | int | None) -> float | None:
    """`value` relative to `base`: 0.25 is 25 % more. None where there is nothing to compare with."""
    if value is None or base is None or base == 0:
        return None
    return value / base - 1


def percent(share: float | None, signed: bool = False) -> str:
    """0.1234 as "12.3%"; with `signed` as "+12.3%"; ten times and more as a factor."""
    if share is None:
        return ""
    if signed and share >= 9:
        return f"x{share + 1:,.0f}"
    if abs(share) < 0.0005:
        return "±0%" if signed else "0.0%" if share == 0 else "<0.1%"
    return f"{share * 100:+.1f}%" if signed else f"{share * 100:.1f}%"


def written(values: list[float | int | None], unit: Unit) -> list[str]:
    """The values of one row as text with units; seconds all in the unit (s, ms, µs) that suits the largest, unless that
    would leave nothing of the smallest."""
    sizes = [abs(value) for value in values if value]
    if unit is Unit.SECONDS and sizes and max(sizes) > _FAR_APART * min(sizes):
        return [written([value], unit)[0] for value in values]
    factor, name, digits = _seconds_scale(values) if unit is Unit.SECONDS else (1.0, unit.value, None)
    return [UNKNOWN if value is None else _one(value * factor, name, digits, unit) for value in values]


_FAR_APART = 500


def _seconds_scale(values: list[float | int | None]) -> tuple[float, str, int | None]:
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest >= 1:
        return 1.0, "s", 3 if largest < 100 else 1
    return (1e3, "ms", 2 if largest < 0.1 else 1) if largest >= 1e-3 else (1e6, "µs", 1)


def _one(value: float, name: str, digits: int | None, unit: Unit) -> str:
    if unit is Unit.SHARE:
        return f"{value * 100:.1f}%"
    if unit is Unit.AMOUNT:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if digits is None:
        digits = 0 if isinstance(value, int) or float(value).is_integer() or abs(value) >= 1000 else 1
        if abs(value) < 10 and not float(value).is_integer():
            digits = 2
    return f"{value:,.{digits}f} {name}".rstrip()
