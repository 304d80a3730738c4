"""What a prediction's error would be with another link between GPUs: the reference's where it names one, else one twice as
slow and one twice as fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from backends.simulated.cost.models.communication import reached_link
from ground.link import Link, parse_latency, parse_rate, written_rate, written_time
from reports.record.run_record import RunRecord
from workbench.cluster.pools import SimulatedPool
from workbench.settings.cost_spec import split
from workbench.settings.run_settings import RunSettings

METRICS = ("ttft", "tpot", "e2e")
Errors = dict[str, float | None]


def link_effect(
    a: RunRecord, settings: RunSettings, pool: SimulatedPool, now: Errors, errors_with: Callable[[RunSettings], Errors]
) -> dict[str, Any]:
    """How the errors ``now`` of a run of ``settings`` against A depend on the link between its GPUs, with ``lines`` that say
    so; empty where none work together, or where step times hold the link. ``errors_with`` simulates other settings."""
    recipe = pool.recipe
    together = recipe.tp * settings.dp if recipe.lock_step else recipe.gpus
    if together == 1 or settings.pool or split(settings.cost)[0] in ("fitted", "module:Class"):
        return {}
    apart = together > recipe.gpu.gpus_per_node
    name, link = ("node_link", recipe.gpu.node_link) if apart else ("link", reached_link(together, recipe.gpu))
    said = getattr(settings, name) is not None and getattr(settings, f"{name}_latency") is not None
    where = "link between nodes" if apart else "link between GPUs"
    theirs = _said_by(a, name, link)
    if theirs is not None and theirs != link:
        with_theirs = errors_with(_with(settings, name, theirs))
        lines = [
            f"{where}: {link} here, {theirs} in A; with A's the errors of the means are {_in_words(with_theirs)}, "
            f"not {_in_words(now)}"
        ]
        return {"link": str(link), "with_reference": {"link": str(theirs), **with_theirs}, "lines": lines}
    found: dict[str, Any] = {"link": str(link), "assumed": not said}
    for key, factor in (("twice_as_slow", 0.5), ("twice_as_fast", 2.0)):
        other = Link(link.bandwidth * factor, link.latency_s / factor)
        found[key] = errors_with(_with(settings, name, other))
    slow, fast = found["twice_as_slow"], found["twice_as_fast"]
    lines = [
        f"{where}: {link} {'as it was said' if said else 'assumed'}; twice as slow the errors of the means would be "
        f"{_in_words(slow)}, twice as fast {_in_words(fast)}"
    ]
    able = [metric.upper() for metric in METRICS if _between(slow[metric], fast[metric])]
    if able and not said:
        causes = " and ".join(able)
        flag = f"--{name.replace('_', '-')}"
        lines.append(f"  a link between these could be all of the error of {causes}: {flag} says yours")
    return {**found, "lines": lines}


def _said_by(a: RunRecord, name: str, link: Link) -> Link | None:
    """The link that A's record names, the rest as in ``link``; None where it names none."""
    settings = a.meta.get("settings") or {}
    rate, latency = settings.get(name), settings.get(f"{name}_latency")
    if rate is None and latency is None:
        return None
    return Link(
        link.bandwidth if rate is None else parse_rate(rate),
        link.latency_s if latency is None else parse_latency(latency),
    )


def _with(settings: RunSettings, name: str, link: Link) -> RunSettings:
    said = {name: written_rate(link.bandwidth), f"{name}_latency": written_time(link.latency_s)}
    return dataclasses.replace(settings, **said)  # type: ignore[arg-type]


def _between(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one * other < 0


def _in_words(errors: Errors) -> str:
    return ", ".join(
        f"{metric.upper()} {'-' if errors[metric] is None else f'{errors[metric]:+.1%}'}" for metric in METRICS
    )
