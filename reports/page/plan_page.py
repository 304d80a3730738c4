"""The page of a plan: the answer, every configuration with its highest rate, and the simulations that found it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ground.whole_file import write_whole
from reports.metrics.labels import Unit, percent, written
from reports.page.html_file import asset, rendered
from reports.page.sweep_page import said
from reports.record.errors import RecordError


def write_plan_page(found: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Write the page of a plan, as plan.json holds it; `names` are the settings that were varied, or `pools`.

    Raises RecordError.
    """
    write_whole(path, plan_page_html(found, names), RecordError)


def plan_page_html(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """The page as text."""
    searched = [candidate for candidate in found["candidates"] if "highest_rate" in candidate]
    target, slo = found["target_rate"], found["slo"]
    top = max([target, *(candidate["highest_rate"] or 0 for candidate in searched)]) * 1.04
    priced = any(candidate["cost_per_hour"] is not None for candidate in searched)
    return rendered(
        "plan.html",
        style=asset("search.css"),
        script=asset("plan.js"),
        title=f"Plan for {found['trace']['name']}",
        facts=[
            ("Trace", f"{found['trace']['name']}, {found['trace']['requests']:,} requests"),
            ("SLO", ", ".join(f"{name} ≤ {written([limit], Unit.SECONDS)[0]}" for name, limit in slo.items())),
            ("To carry", f"{target:.4g} arrivals/s"),
            ("Simulations", str(sum(candidate["simulations"] for candidate in searched))),
        ],
        answer=found["answer"],
        deploy=found.get("deploy", []),
        rests_on=found.get("rests_on", []),
        notes=[*found["notes"], *found["trace"]["notes"]],
        names=names,
        limits=list(slo),
        priced=priced,
        currency=found["currency"],
        target_x=f"{100 * target / top:.2f}",
        target=f"{target:.4g}/s",
        rows=[_row(candidate, names, slo, top) for candidate in searched],
        others=[
            {
                "settings": _said(candidate, names),
                "status": candidate["status"],
                "reason": candidate["reason"],
            }
            for candidate in found["candidates"]
            if "highest_rate" not in candidate
        ],
        searches=[_search(candidate, names, slo) for candidate in searched],
        command=found["command"],
        shared=[(name, said(value)) for name, value in sorted(found["settings"].items())],
    )


def _row(candidate: Mapping[str, Any], names: Sequence[str], slo: Mapping[str, float], top: float) -> dict[str, Any]:
    rate = candidate["highest_rate"]
    measured = candidate["at_highest_rate"]
    cost = candidate["cost_per_hour"]
    per_million = cost / 3600 / rate * 1e6 if cost is not None and rate else None
    return {
        "name": _named(candidate, names),
        "settings": _said(candidate, names),
        "gpus": candidate["gpus"],
        "gpu": candidate["gpu"],
        "cost": "-" if cost is None else f"{cost:,.2f}",
        "per_million": "-" if per_million is None else f"{per_million:,.2f}",
        "carries": candidate["carries_target"],
        "rate": "any" if candidate["unbounded"] else f"{rate:.4g}" if rate else "none",
        "rate_value": math.inf if candidate["unbounded"] else rate or 0.0,
        "bar": 100.0 if candidate["unbounded"] else 100 * (rate or 0.0) / top,
        "margin": "" if candidate["unbounded"] else percent(candidate["margin"], signed=True),
        "margin_value": math.inf if candidate["unbounded"] else candidate["margin"],
        "cost_value": cost if cost is not None else candidate["gpus"],
        "per_million_value": per_million if per_million is not None else math.inf,
        "limits": [
            {
                "text": written([measured.get(name)], Unit.SECONDS)[0],
                "value": measured.get(name) or math.inf,
                "share": "" if measured.get(name) is None else percent(measured[name] / limit),
            }
            for name, limit in slo.items()
        ],
        "breaks": candidate["breaks_first"] or "-",
    }


def _search(candidate: Mapping[str, Any], names: Sequence[str], slo: Mapping[str, float]) -> dict[str, Any]:
    """The simulations of one configuration, by rate, and where they lie on a logarithmic axis of rates."""
    rates = [probe["rate"] for probe in candidate["probes"] if probe["rate"]]
    low, high = (min(rates) / 1.15, max(rates) * 1.15) if rates else (0.5, 2.0)
    marks, rows = [], []
    for number, probe in enumerate(candidate["probes"], 1):
        rate = (
            "all at once"
            if probe["all_at_once"]
            else "one at a time"
            if probe["one_at_a_time"]
            else f"{probe['rate']:.4g}/s"
        )
        outcome = "kept" if probe["kept"] else f"lost: {', '.join(probe['broken'])}"
        rows.append(
            {
                "number": number,
                "rate": rate,
                "kept": probe["kept"],
                "outcome": outcome + (", stopped early" if probe["stopped_early"] else ""),
                "limits": [written([probe["measured_s"].get(name)], Unit.SECONDS)[0] for name in slo],
            }
        )
        if probe["rate"]:
            x = 4 + 92 * math.log(probe["rate"] / low) / math.log(high / low)
            marks.append({"x": f"{x:.2f}", "kept": probe["kept"], "text": f"{number}. {rate}: {outcome}"})
    return {
        "name": _named(candidate, names),
        "marks": marks,
        "rows": rows,
        "low": f"{low * 1.15:.4g}/s",
        "high": f"{high / 1.15:.4g}/s",
        "burst": f"{candidate['burst_rps']:.4g}",
        "breaks": candidate["breaks_first"],
        "command": candidate["command"],
    }


def _named(candidate: Mapping[str, Any], names: Sequence[str]) -> str:
    texts = zip(names, _said(candidate, names), strict=True)
    return ", ".join(text if name == "pools" else f"{name} {text}" for name, text in texts) or "the configuration"


def _said(candidate: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The settings of a candidate as texts; `pools` stands for all that is said of them."""
    return [" + ".join(candidate["pools"]) if name == "pools" else said(candidate["settings"][name]) for name in names]
