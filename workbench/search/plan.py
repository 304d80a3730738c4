"""Plans: the highest rate of every configuration of a space, and the cheapest that carries the load."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.json_file import json_text, read_json
from ground.whole_file import write_whole
from reports.metrics.cuts import cut_text
from reports.metrics.how_sure import sure_lines
from reports.metrics.labels import percent
from reports.page.plan_page import write_plan_page
from traces.reshape import reshape
from workbench.cluster.pools import assumed_links, gpus_of, resolve_pools
from workbench.recording.of_pools import gpus_in_words
from workbench.search.both_in_one import Offer, Span, cheaper_spans, layout
from workbench.search.candidate import Candidate, Load
from workbench.search.executor import open_executor
from workbench.search.point import FAILED, FINISHED, INCOMPLETE, INVALID, TIMED_OUT, Shared
from workbench.search.rate import HighestRate, highest_rate, simulator
from workbench.search.slo import Limit
from workbench.search.space import Point, SpaceError
from workbench.search.stands import stands
from workbench.search.sureness import how_sure
from workbench.settings.pool_keys import split_name
from workbench.settings.run_settings import RunSettings

TICK_S = 0.25
FORMAT = "workbench plan"
PLAN, PAGE = "plan.json", "plan.html"


class PlanFolderError(InputError):
    """A folder that cannot be used for a plan, in one line."""


def measure_load(shared: Shared, points: list[Point], rate: float | None) -> Load:
    """Count the trace. Raises ValueError for a target rate that is missing or not positive, and for a trace that has no
    rate to change."""
    settings = _any_settings(shared, points)
    if settings.concurrency is not None:
        raise SpaceError("concurrency: replaces arrivals, and plan looks for their highest rate")
    if rate is not None and not 0 < rate < math.inf:
        raise SpaceError(f"rate: {rate} is not positive")
    arrivals, requests, first_s, last_s = 0, 0, 0.0, 0.0
    for request in reshape(shared.trace, None, settings.speedup, settings.requests):
        requests += 1
        if request.arrival_s is not None:
            first_s = request.arrival_s if not arrivals else first_s
            last_s, arrivals = request.arrival_s, arrivals + 1
    if arrivals < 2:
        raise SpaceError(f"{shared.trace.info.path}: {arrivals} arrival: there is no rate to search for")
    own = (arrivals - 1) / (last_s - first_s) if last_s > first_s else None
    if rate is None and own is None:
        raise SpaceError(
            f"{shared.trace.info.path}: all requests arrive at the same time; say with --rate what to carry"
        )
    target = rate if rate is not None else own
    assert target is not None
    return Load(arrivals, requests, own, target)


def _any_settings(shared: Shared, points: list[Point]) -> RunSettings:
    """Resolve the settings of the first configuration that can be."""
    for point in points:
        with contextlib.suppress(ValueError):
            return shared.base.settings(point)[0]
    return shared.base.settings(points[0])[0]


def plan_point(shared: Shared, limits: list[Limit], load: Load, point: Point) -> Candidate:
    """Search the highest rate of one configuration."""
    pools = layout(shared, point)
    try:
        settings, loop = shared.base.settings(point)
        resolved = resolve_pools(settings, loop)
        by_name, links = gpus_of(resolved), assumed_links(resolved)
        gpus, gpu = sum(by_name.values()), gpus_in_words(by_name)
        cost = shared.prices.an_hour(by_name) if shared.prices is not None else None
        trace = reshape(shared.trace, None, settings.speedup, settings.requests)
        simulate = simulator(settings, loop, trace, shared.trace_sha256, shared.command)
        found = highest_rate(simulate, limits, load.arrivals, load.requests, load.target)
    except ValueError as error:
        return Candidate(point, INVALID, str(error), pools=pools)
    pairs = settings.disaggregated
    if found.refused is not None and found.refused.everything:
        return Candidate(point, INCOMPLETE, found.refused.sentence, gpu, gpus, cost, pools=pools, shared_requests=pairs)
    sure = how_sure(resolved, simulate, limits, load.target, found)
    at = found.rate if 0 < found.rate < math.inf else load.target
    # The rate takes the place of what else was said of arrivals.
    command = shared.command_for(point, rate=float(f"{at:.6g}"), speedup=None)
    return Candidate(point, FINISHED, "", gpu, gpus, cost, found, command, pools, pairs, links, sure)


def run_plan(
    shared: Shared,
    points: list[Point],
    limits: list[Limit],
    load: Load,
    *,
    executor: str = "local",
    jobs: int | None = None,
    time_limit_s: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Every configuration side by side; the best first (see `ranked`). KeyboardInterrupt passes through.

    Raises ExecutorError.
    """
    candidates: list[Candidate] = []
    waiting = list(reversed(points))
    with open_executor(executor, partial(plan_point, shared, limits, load), jobs, time_limit_s) as running:
        while waiting or running.running:
            while waiting and running.free:
                point = waiting.pop()
                try:
                    shared.check(point)
                except ValueError as error:
                    candidates.append(Candidate(point, INVALID, str(error)))
                else:
                    running.start(len(waiting), point)
            for done in running.wait(TICK_S):
                assert isinstance(done.key, int)
                point = points[len(points) - 1 - done.key]
                if done.timed_out:
                    candidates.append(Candidate(point, TIMED_OUT, f"searched for more than {time_limit_s:g} s"))
                elif done.fault is not None:
                    candidates.append(Candidate(point, FAILED, done.fault))
                else:
                    candidates.append(done.result)
            if progress is not None:
                progress(len(candidates), running.running)
    return ranked(_held_to_the_most(candidates), load.target)


def _held_to_the_most(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates, those that can serve fewer requests than another as incomplete: the rest of the load is easier."""
    fewest = min((_refused(candidate) for candidate in candidates if candidate.found is not None), default=0)
    return [
        replace(candidate, status=INCOMPLETE, reason=candidate.found.refused.sentence)
        if candidate.found is not None and candidate.found.refused is not None and _refused(candidate) > fewest
        else candidate
        for candidate in candidates
    ]


def _refused(candidate: Candidate) -> int:
    return (
        candidate.found.refused.requests if candidate.found is not None and candidate.found.refused is not None else 0
    )


def ranked(candidates: list[Candidate], target: float) -> list[Candidate]:
    """Those that carry the target first, the cheapest of them at the top (without prices: with the fewest GPUs), and of
    equally cheap ones that with the most margin. Then those that fall short, the closest first; then the rest."""

    def order(candidate: Candidate) -> tuple[Any, ...]:
        cost = candidate.price
        if candidate.carries:
            return 0, cost, -candidate.margin(target), str(candidate.point)
        return (1 if candidate.found is not None else 2), -candidate.margin(target), cost, str(candidate.point)

    return sorted(candidates, key=order)


def answer(candidates: list[Candidate], limits: list[Limit], load: Load, currency: str = "") -> list[str]:
    """The plan in sentences: the choice, its margin, the next best, what breaks first, and what load it leaves out."""
    return [
        *_choice(candidates, limits, load, currency),
        *stands(candidates, _described(currency)),
        *_both_or_pairs(candidates, load, currency),
        *_lighter(candidates),
    ]


def _both_or_pairs(candidates: list[Candidate], load: Load, currency: str) -> list[str]:
    """Say whether serving both in one is cheaper than pools that prefill and pools that decode, and from which load on."""
    pairs, both = _ways(candidates)
    if not pairs or not both:
        return []
    lines = []
    carrying = [next((one for one in way if one.carries), None) for way in (pairs, both)]
    one, other = carrying
    if one is not None and other is not None:
        lines.append(_against(one, other, load, currency))
    elif one is not None:
        lines.append(
            f"Nothing searched that serves both in one carries it: {_highest(both[0], load, brief=True)} ({_name(both[0])})."
        )
    elif other is not None:
        lines.append(
            f"Nothing searched that is disaggregated carries it: {_highest(pairs[0], load, brief=True)} ({_name(pairs[0])})."
        )
    spans = _disaggregated_cheaper(candidates)
    if not any(candidate.found is not None and candidate.found.rate for candidate in (*pairs, *both)):
        return lines
    if not spans:
        lines.append("At no load that was searched is it cheaper to prefill and decode in different pools.")
    else:
        listed = ", ".join(map(_span, spans))
        lines.append(f"To prefill and decode in different pools is the cheaper of the two {listed}.")
    return lines


def _span(span: Span) -> str:
    if not span.over:
        return f"up to {span.upto:.4g} arrivals/s" if math.isfinite(span.upto) else "at any load"
    return f"above {span.over:.4g} arrivals/s" + (f" and up to {span.upto:.4g}" if math.isfinite(span.upto) else "")


def _against(one: Candidate, other: Candidate, load: Load, currency: str) -> str:
    """Compare the cheapest that is disaggregated with the cheapest that serves both in one."""
    ours, theirs = (f"{_name(candidate)}{_cost(candidate, currency)}" for candidate in (one, other))
    cost, against = one.price, other.price
    if cost == against:
        said = "costs as much as"
    elif one.cost_per_hour is None:
        said = f"takes {'more' if cost > against else 'fewer'} GPUs than"
    else:
        share = percent(abs(cost / against - 1)) if against else "infinitely"
        said = f"is {share} {'dearer' if cost > against else 'cheaper'} than"
    return f"Disaggregated: {ours} {said} serving both in one: {theirs}, at {load.target:.4g} arrivals/s."


def _ways(candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """The searched candidates that are disaggregated, and those that serve both in one."""
    searched = [candidate for candidate in candidates if candidate.status == FINISHED and candidate.pools]
    return [c for c in searched if c.shared_requests], [c for c in searched if not c.shared_requests]


def _disaggregated_cheaper(candidates: list[Candidate]) -> list[Span]:
    pairs, both = ([Offer(c.price, c.found.rate if c.found else 0.0) for c in way] for way in _ways(candidates))
    return cheaper_spans(pairs, both)


def _lighter(candidates: list[Candidate]) -> list[str]:
    """Say in how far the load that was searched with is less than the trace's."""
    lines = []
    searched = [candidate for candidate in candidates if candidate.found is not None]
    for candidate in searched[:1]:
        assert candidate.found is not None
        if candidate.found.refused is not None:
            lines.append(f"Left out: {candidate.found.refused.sentence}.")
        for cause, of in candidate.found.cut.items():
            lines.append(f"Cut short: {cut_text(cause, of)}.")
    for candidate in candidates:
        if candidate.status == INCOMPLETE:
            lines.append(f"{_name(candidate)} cannot serve every request: {candidate.reason}.")
    return lines


def _choice(candidates: list[Candidate], limits: list[Limit], load: Load, currency: str) -> list[str]:
    searched = [candidate for candidate in candidates if candidate.found is not None]
    slo = ", ".join(map(str, limits))
    if not searched:
        reasons = "; ".join(dict.fromkeys(candidate.reason for candidate in candidates))
        return [f"No configuration can run: {reasons}"]
    if all(candidate.found is not None and candidate.found.rate == 0 for candidate in searched):
        first = searched[0].found
        assert first is not None
        return [
            f"The SLO ({slo}) cannot be met: {_name(searched[0])} misses it even with one request at a time; {first.breaks}."
        ]
    best = candidates[0]
    assert best.found is not None
    lines = []
    many = len(candidates) > 1
    if best.carries:
        cost = _cost(best, currency)
        choice = f"{_name(best)}{cost} " if many else ""
        lines.append(
            f"{choice}{'keeps' if many else 'Keeps'} {slo} at {load.target:.4g} arrivals/s"
            + (
                f", the {'cheapest' if best.cost_per_hour is not None else 'fewest GPUs'} of {len(searched)} searched."
                if many
                else "."
            )
        )
    else:
        lines.append(
            f"Nothing searched keeps {slo} at {load.target:.4g} arrivals/s; closest: {_name(best)}{_cost(best, currency)}."
        )
    lines.append(_highest(best, load))
    if best.found.breaks:
        lines.append(f"What breaks first: {best.found.breaks}.")
    others = [candidate for candidate in candidates[1:] if candidate.carries]
    if best.carries and others:
        lines.append(
            f"Next best: {_name(others[0])}{_cost(others[0], currency)}, {_highest(others[0], load, brief=True)}."
        )
    elif best.carries and many:
        lines.append("No other configuration that was searched carries it.")
    return lines


def _highest(candidate: Candidate, load: Load, brief: bool = False) -> str:
    found = candidate.found
    assert found is not None
    if math.isinf(found.rate):
        text = "the SLO is kept even with all requests at once: the trace is too short or too light to find a limit"
    elif found.rate == 0 and found.probes[-1].rate != 0 and any(p.rate == 0 and p.kept for p in found.probes):
        text = f"the SLO is kept with one request at a time, but not {_where(found.lost_at)}"
    elif found.rate == 0:
        text = "it misses the SLO even with one request at a time"
    else:
        text = f"highest rate {found.rate:.4g}/s, {candidate.margin(load.target):+.1%} against the target"
        if not brief:
            text += f" (lost {_where(found.lost_at)}; {len(found.probes)} simulations)"
    return text if brief else text[0].upper() + text[1:] + "."


def _where(rate: float) -> str:
    return "with all requests at once" if math.isinf(rate) else f"at {rate:.4g} arrivals/s"


def _described(currency: str) -> Callable[[Candidate], str]:
    return lambda candidate: f"{_name(candidate)}{_cost(candidate, currency)}"


def _name(candidate: Candidate) -> str:
    pools = " + ".join(candidate.pools)
    rest = {name: value for name, value in candidate.point.items() if not pools or own_name(name)}
    settings = ", ".join(
        [*[pools] * bool(pools), *(f"{name} {'none' if v is None else v}" for name, v in rest.items())]
    )
    return settings or "this configuration"


def own_name(name: str) -> bool:
    """Tell whether a varied setting is of the run, not part of its pools."""
    return name != "pool" and split_name(name) is None


def _cost(candidate: Candidate, currency: str) -> str:
    gpus = f"{candidate.gpus} {candidate.gpu}"
    if candidate.cost_per_hour is None:
        return f" ({gpus})"
    return f" ({gpus}, {candidate.cost_per_hour:,.2f}{' ' + currency if currency else ''} an hour)"


def result(candidates: list[Candidate], limits: list[Limit], load: Load, shared: Shared) -> dict[str, Any]:
    """The plan as JSON."""
    prices = shared.prices
    notes = []
    if prices is None and len({candidate.gpu for candidate in candidates if candidate.gpu}) > 1:
        notes.append("different GPUs are ranked by their number alone; --prices ranks them by cost")
    if prices is not None:
        notes.append(f"prices from {prices.path}" + (f": {prices.source}" if prices.source else ""))
    notes += dict.fromkeys(note for candidate in candidates for note in candidate.links)
    if any(_above_burst(candidate.found, load) for candidate in candidates if candidate.found is not None):
        notes.append(
            "a highest rate above what is finished when all requests come at once may owe to the trace's end: with more "
            "requests the queue would go on growing"
        )
    return {
        "answer": answer(candidates, limits, load, prices.currency if prices is not None else ""),
        "slo": {limit.name: limit.limit_s for limit in limits},
        "target_rate": load.target,
        "trace": {
            "name": shared.trace.info.name,
            "sha256": shared.trace_sha256,
            "requests": load.requests,
            "arrivals": load.arrivals,
            "own_rate": load.own_rate,
            "notes": list(shared.trace.info.notes),
        },
        "settings": shared.base.given(),
        "currency": prices.currency if prices is not None else "",
        "command": shared.command,
        "notes": notes,
        **({"disaggregated_cheaper": _spans(candidates)} if all(_ways(candidates)) else {}),
        "deploy": [each.to_json() for each in candidates[0].sure.deploy],
        "rests_on": sure_lines(candidates[0].sure.said),
        "candidates": [to_dict(candidate, load.target) for candidate in candidates],
    }


def _spans(candidates: list[Candidate]) -> list[dict[str, float | None]]:
    return [{"over_rate": span.over, "up_to_rate": _finite(span.upto)} for span in _disaggregated_cheaper(candidates)]


def _above_burst(found: HighestRate, load: Load) -> bool:
    return found.burst_rps * load.arrivals / load.requests < found.rate < math.inf


def prepare_plan_folder(folder: Path, force: bool) -> None:
    """Check that a folder is missing, empty, or holds a plan that `force` allows to replace. Raises PlanFolderError."""
    if folder.exists() and not folder.is_dir():
        raise PlanFolderError(f"{folder}: exists and is not a folder")
    entries = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if entries - {PLAN, PAGE} or (entries and not _is_plan(folder / PLAN)):
        raise PlanFolderError(f"{folder}: exists and holds {min(entries - {PLAN} or entries)}, which no plan wrote")
    if entries and not force:
        raise PlanFolderError(f"{folder}: holds a plan; --force replaces it")


def _is_plan(path: Path) -> bool:
    try:
        return read_json(path).get("format") == FORMAT
    except InputError:
        return False


def write_plan(found: dict[str, Any], names: list[str], folder: Path) -> Path:
    """Write plan.json and plan.html; returns the page's path. Raises InputError."""
    text = json_text({"format": FORMAT, **found}) + "\n"
    write_whole(folder / PLAN, text)
    write_plan_page(found, names, folder / PAGE)
    return folder / PAGE


def to_dict(candidate: Candidate, target: float) -> dict[str, Any]:
    """A candidate as JSON; an infinite rate is None with `unbounded`."""
    found = candidate.found
    row: dict[str, Any] = {
        "settings": candidate.point,
        "status": candidate.status,
        "reason": candidate.reason,
        "gpu": candidate.gpu,
        "gpus": candidate.gpus,
        "cost_per_hour": candidate.cost_per_hour,
        **({"pools": list(candidate.pools), "disaggregated": candidate.shared_requests} if candidate.pools else {}),
        "carries_target": candidate.carries,
    }
    if found is None:
        return row
    return {
        **row,
        "highest_rate": _finite(found.rate),
        "unbounded": math.isinf(found.rate),
        "lost_at": _finite(found.lost_at),
        "margin": _finite(candidate.margin(target)),
        "burst_rps": found.burst_rps,
        "simulations": len(found.probes),
        "breaks_first": found.breaks,
        "requests_rejected": _refused(candidate),
        "cut": found.cut,
        "at_highest_rate": found.at_rate.measured_s if found.at_rate is not None else {},
        "probes": [
            {
                "rate": _finite(p.rate),
                "all_at_once": math.isinf(p.rate),
                "one_at_a_time": p.rate == 0,
                "kept": p.kept,
                "stopped_early": p.stopped,
                "broken": list(p.broken),
                "measured_s": {name: _finite(value) for name, value in p.measured_s.items()},
            }
            for p in found.probes
        ],
        "command": candidate.command,
        **candidate.sure.to_json(),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
