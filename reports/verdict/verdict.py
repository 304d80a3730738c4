"""The verdict in sentences: which run wins on what, by how much, and what in the records explains it.

Everything is derived from the summaries of `metrics.summarise` and, where they are given, the seconds of
`time_use.time_use`. A sentence is written only when the number behind it is
big enough to matter; the thresholds stand at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reports.metrics.handovers import is_shared
from reports.metrics.labels import METRICS, Better, Summaries, Unit, difference, percent, values_of, written
from reports.metrics.time_use import TimeUse
from reports.record.run_record import RunRecord
from reports.verdict.pool_verdict import pool_sentences

ALIKE = 0.02
"""Runs whose values differ by less than this are called equal."""
NOTICEABLE_SHARE = 0.02
"""A share of time or of tokens (or a difference of two) below this explains nothing."""
QUEUE_BOUND = 0.5
"""With more than this share of its TTFT spent queueing, a run is short of capacity, or its loop late, rather than slow."""

_Summary = Mapping[str, float | int | None]


Uses = Mapping[str, TimeUse | None]


@dataclass(frozen=True)
class Headline:
    """One number that decides: which run has the best of it. `against` compares with the baseline ("" for itself)."""

    name: str
    label: str
    run: str
    text: str
    against: str
    alike: bool


HEADLINES = {
    "output_throughput": "Output throughput",
    "goodput_rps": "Goodput in SLO",
    "ttft_p99_s": "TTFT p99",
    "tpot_mean_s": "TPOT mean",
    "e2e_p99_s": "E2E p99",
}


def headlines(summaries: Summaries, baseline: str | None = None) -> list[Headline]:
    """The best run by each of the numbers in `HEADLINES` that any run has."""
    base = baseline if baseline in summaries else next(iter(summaries), None)
    found = []
    for name, label in HEADLINES.items():
        metric = METRICS[name]
        values = values_of(metric, summaries)
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = max(known) if metric.better is Better.HIGHER else min(known)
        place = values.index(best)
        run = list(summaries)[place]
        alike = len(known) > 1 and (max(known) - min(known)) / (abs(max(known)) or 1.0) < ALIKE / 10
        share = difference(best, summaries[base].get(name)) if base is not None and run != base else None
        found.append(
            Headline(name, label, run, written(values, metric.unit)[place], percent(share, signed=True), alike)
        )
    return found


Records = Mapping[str, RunRecord]


def verdict(summaries: Summaries, uses: Uses | None = None, records: Records | None = None) -> list[str]:
    """Plain sentences: first the outcome, then the reasons. Never empty for at least one run.

    With `uses` (where the time of each run went) the reasons tell the CPU's share from that of bubbles and memory; with
    `records` they say which pool is short where some prefill and others decode.
    """
    return [*outcome(summaries), *reasons(summaries, uses, records)]


def outcome(summaries: Summaries) -> list[str]:
    """Say which run wins on what, by how much; and which runs did not finish what they were given."""
    return [*_incomplete(summaries), *_winners(summaries)]


def reasons(summaries: Summaries, uses: Uses | None = None, records: Records | None = None) -> list[str]:
    """Explain the outcome by what is in the records."""
    shared = {run: record for run, record in (records or {}).items() if is_shared(record)}
    alone = {run: summary for run, summary in summaries.items() if run not in shared}
    known = {run: use for run, use in (uses or {}).items() if use is not None}
    where = _where_time_went(known) if known else [*_cpu(summaries), *_bubbles(summaries)]
    pools = pool_sentences(shared)
    return [*pools, *where, *_cache(summaries), *_retraction(summaries, known), *_queueing(alone)]


def _where_time_went(uses: Mapping[str, TimeUse]) -> list[str]:
    return [
        *_host(uses),
        *_idle(uses, "bubble", "in pipeline bubbles: what it could compute is on another stage"),
        *_idle(uses, "kv", "because queued requests do not fit into KV memory"),
        *_wasted(uses),
    ]


def _host(uses: Mapping[str, TimeUse]) -> list[str]:
    idle = {run: use.idle_s["cpu"] / use.gpu_s for run, use in uses.items()}
    most, least = max(idle, key=idle.__getitem__), min(idle, key=idle.__getitem__)
    if idle[most] < NOTICEABLE_SHARE:
        return []
    line = (
        f"{most} keeps the GPU waiting for the CPU {percent(idle[most])} of the time ({_seconds(uses[most].idle_s['cpu'])}):"
        f" it hides {_hidden(uses[most])}"
    )
    if idle[most] - idle[least] < NOTICEABLE_SHARE:
        return [f"{line}." if len(uses) == 1 else f"{line}; the other runs do no better than {percent(idle[least])}."]
    return [f"{line}. {least} waits {percent(idle[least])}, hiding {_hidden(uses[least])}."]


def _hidden(use: TimeUse) -> str:
    if not use.host_s:
        return "nothing, as its CPU phases took no time"
    return f"{percent(use.hidden_s / use.host_s)} of its {_seconds(use.host_s)} of CPU work behind the GPU's"


def _idle(uses: Mapping[str, TimeUse], cause: str, what: str) -> list[str]:
    shares = {run: use.idle_s[cause] / use.gpu_s for run, use in uses.items()}
    listed = [f"{percent(share)} in {run}" for run, share in shares.items() if share >= NOTICEABLE_SHARE]
    return [f"The GPU stands idle {what} ({', '.join(listed)})."] if listed else []


def _wasted(uses: Mapping[str, TimeUse]) -> list[str]:
    """Batches that cost more GPU time in one run than in another: smaller ones, or sliced by stages."""
    busy = {run: sum(use.busy_s.values()) * use.gpus_a_stage for run, use in uses.items() if any(use.busy_s.values())}
    if len(busy) < 2:
        return []
    most, least = max(busy, key=busy.__getitem__), min(busy, key=busy.__getitem__)
    apart = busy[most] / busy[least] - 1
    if apart < ALIKE:
        return []
    return [
        f"{most} spends {percent(apart)} more GPU time on its batches than {least}"
        f" ({busy[most]:,.1f} against {busy[least]:,.1f} GPU seconds)."
    ]


def _seconds(value_s: float) -> str:
    return written([value_s], Unit.SECONDS)[0]


def _incomplete(summaries: Summaries) -> list[str]:
    lines = []
    for name, summary in summaries.items():
        finished, total = _number(summary, "requests_finished"), _number(summary, "requests_total")
        if finished < total:
            lost = [
                f"{_number(summary, f'requests_{outcome}'):.0f} {outcome}"
                for outcome in ("aborted", "rejected", "unfinished")
                if _number(summary, f"requests_{outcome}")
            ]
            lines.append(
                f"{name} finished {finished:,.0f} of {total:,.0f} requests ({', '.join(lost)});"
                " its latencies and throughput count the finished ones."
            )
    return lines


def _winners(summaries: Summaries) -> list[str]:
    chosen = [
        ("output_throughput", "output throughput"),
        ("goodput_rps", "goodput within the SLO"),
        ("ttft_p99_s", "p99 TTFT"),
        ("tpot_mean_s", "mean TPOT"),
    ]
    lines = [_winner(name, label, summaries) for name, label in chosen]
    return [line for line in lines if line]


def _winner(name: str, label: str, summaries: Summaries) -> str:
    metric = METRICS[name]
    known = {run: value for run, summary in summaries.items() if (value := summary.get(name)) is not None}
    if not known:
        return ""
    texts = dict(zip(known, written(list(known.values()), metric.unit), strict=True))
    if len(known) == 1:
        (run,) = known
        return f"{run}: {label} {texts[run]}."
    ranked = sorted(known, key=lambda run: known[run], reverse=metric.better is Better.HIGHER)
    best, second, last = ranked[0], ranked[1], ranked[-1]
    apart = abs(known[best] - known[last]) / (abs(known[last]) or 1.0)
    if apart < ALIKE:
        return f"{_capital(label)} is the same in all runs to within {percent(ALIKE)}: {texts[best]} in {best}."
    word = "highest" if metric.better is Better.HIGHER else "lowest"
    line = f"{best} has the {word} {label}: {texts[best]}"
    against = [second] if second == last else [second, last]
    return f"{line}, {' and '.join(_against(known, texts, best, other) for other in against)}."


def _against(known: Mapping[str, float | int], texts: Mapping[str, str], best: str, other: str) -> str:
    if not known[other]:
        return f"against {texts[other]} in {other}"
    share = known[best] / known[other] - 1
    size = f"{abs(share) * 100:.1f}%" if abs(share) < 1 else f"{share + 1:.1f} times, or {share * 100:.0f}%"
    return f"{size} {'above' if share > 0 else 'below'} {other} ({texts[other]})"


def _cpu(summaries: Summaries) -> list[str]:
    # With several stages the first one also idles in bubbles, so there the exposed share says nothing about the CPU.
    single = {run: summary for run, summary in summaries.items() if summary.get("bubble_share") is None}
    exposed = _known(single, "cpu_exposed_share")
    if not exposed:
        return []
    most, least = max(exposed, key=exposed.__getitem__), min(exposed, key=exposed.__getitem__)
    if exposed[most] - exposed[least] >= NOTICEABLE_SHARE:
        return [
            f"In {most} the GPU stands idle {percent(exposed[most])} of the time with requests at hand, waiting for the"
            f" CPU; in {least} {percent(exposed[least])}, as the CPU works while the GPU does"
            f" (its own work takes {percent(single[least].get('host_cpu_share'))} of the time)."
        ]
    if exposed[least] >= NOTICEABLE_SHARE:
        return [f"Every run leaves the GPU idle at least {percent(exposed[least])} of the time, waiting for the CPU."]
    return []


def _bubbles(summaries: Summaries) -> list[str]:
    return [
        f"In {run} the stages idle {percent(share)} of the time in which there is work: pipeline bubbles and CPU waits."
        for run, share in _known(summaries, "bubble_share").items()
        if share >= NOTICEABLE_SHARE
    ]


def _cache(summaries: Summaries) -> list[str]:
    rates = _known(summaries, "cache_hit_rate")
    if not rates or max(rates.values()) < NOTICEABLE_SHARE:
        return []
    best, worst = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    if rates[best] - rates[worst] < NOTICEABLE_SHARE:
        return [f"The prefix cache spares {percent(rates[best])} of the input tokens" + _everywhere(rates)]
    return [
        f"The prefix cache spares {best} {percent(rates[best])} of its input tokens, {worst} {percent(rates[worst])}."
    ]


def _everywhere(values: Mapping[str, float]) -> str:
    return ", in every run alike." if len(values) > 1 else "."


def _retraction(summaries: Summaries, uses: Mapping[str, TimeUse]) -> list[str]:
    counts = {run: count for run, count in _known(summaries, "retractions").items() if count}
    if not counts:
        return []
    listed = ", ".join(f"{count:,.0f} times in {run}" for run, count in counts.items())
    lines = [f"Requests lost their KV, to memory pressure or to a higher priority, and were computed again {listed}."]
    again = {run: uses[run] for run in counts if run in uses and uses[run].recomputed_tokens}
    if again:
        lost = ", ".join(
            f"{use.recomputed_tokens:,} tokens, {_seconds(use.recomputed_s)} of GPU time, in {run}"
            for run, use in again.items()
        )
        lines.append(f"Computing what retraction had thrown away took {lost}.")
    return lines


def _queueing(summaries: Summaries) -> list[str]:
    short: list[str] = []
    late: list[str] = []
    for run, summary in summaries.items():
        ttft_s, queue_s = summary.get("ttft_mean_s"), summary.get("queue_mean_s")
        if ttft_s and queue_s is not None and queue_s / ttft_s > QUEUE_BOUND:
            (late if summary.get("peak_waiting") == 0 else short).append(f"{percent(queue_s / ttft_s)} in {run}")
    most = "Most of the mean TTFT is queueing before the first batch"
    lines = [f"{most} ({', '.join(short)}): capacity is short."] if short else []
    if late:
        lines.append(
            f"{most} ({', '.join(late)}), but no batch left a request behind: they wait until the loop has time for them,"
            " not for capacity."
        )
    return lines


def _known(summaries: Summaries, name: str) -> dict[str, float]:
    return {run: value for run, summary in summaries.items() if (value := summary.get(name)) is not None}


def _number(summary: _Summary, name: str) -> float:
    return summary.get(name) or 0


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
