"""Serving both in one, beside pools that prefill and pools that decode: what to search, and which of the two is cheaper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf

from workbench.cluster.pools import resolve_pools
from workbench.search.point import Shared
from workbench.search.space import Point
from workbench.settings.pool_keys import is_of_pairs, split_name
from workbench.settings.pool_spec import PoolSpec, parse_pools
from workbench.settings.run_settings import RunSettings, pool_value


def both_points(shared: Shared, points: Sequence[Point]) -> list[Point]:
    """Points of instances that serve whole requests, of every kind that prefills or decodes in ``points``: from one of them
    up to as many as have no more GPUs than any of ``points``. None where nobody prefills or decodes alone."""
    kinds: dict[tuple[tuple[str, str], ...], None] = {}
    others: dict[tuple[tuple[str, object], ...], None] = {}
    most_gpus = 0
    for point in points:
        try:
            settings, loop = shared.base.settings(point)
            if not settings.disaggregated:
                continue
            most_gpus = max(most_gpus, sum(pool.gpus for pool in resolve_pools(settings, loop)))
        except ValueError:  # what is wrong with a point is said of that point
            continue
        kinds |= dict.fromkeys(_kind(pool, settings) for pool in parse_pools(layout(shared, point)))
        others[tuple((name, value) for name, value in point.items() if split_name(name) is None)] = None
    found: list[Point] = []
    for rest in others:
        for given in kinds:
            for instances in count(1):
                point = {**dict(rest), "pool": (PoolSpec("both", "both", instances, given).text,)}
                if _gpus(shared, point) > most_gpus:
                    break
                found.append(point)
    return found


def layout(shared: Shared, point: Point) -> tuple[str, ...]:
    """The pools of a point, each as ``--pool`` takes it; none where it has none."""
    return tuple(shared.base.said(point).get("pool") or shared.base.given().get("pool") or ())


def _kind(pool: PoolSpec, of_run: RunSettings) -> tuple[tuple[str, str], ...]:
    """Settings of a pool that an instance for whole requests may have, and that the run does not say as well."""
    return tuple(
        (name, value)
        for name, value in pool.given
        if not is_of_pairs(name) and pool_value(name, value) != getattr(of_run, name)
    )


def _gpus(shared: Shared, point: Point) -> float:
    """Count the GPUs of a point; infinitely many where it cannot run."""
    try:
        settings, loop = shared.base.settings(point)
        return sum(pool.gpus for pool in resolve_pools(settings, loop))
    except ValueError:
        return inf


@dataclass(frozen=True)
class Offer:
    """What a configuration costs, and the highest rate that it carries."""

    cost: float
    rate: float


@dataclass(frozen=True)
class Span:
    """Loads, above ``over`` and up to ``upto`` arrivals/s, at which one way to serve is the cheaper one."""

    over: float
    upto: float


def cheaper_spans(ours: Iterable[Offer], theirs: Iterable[Offer]) -> list[Span]:
    """The loads at which the cheapest of ``ours`` that carries them costs less than the cheapest of ``theirs``, or at which
    none of theirs does; in order, those that touch as one."""
    ours, theirs = list(ours), list(theirs)
    rates = sorted({offer.rate for offer in (*ours, *theirs) if offer.rate > 0})
    spans: list[Span] = []
    below = 0.0
    for rate in rates:
        if _cheapest(ours, rate) < _cheapest(theirs, rate):
            if spans and spans[-1].upto == below:
                spans[-1] = Span(spans[-1].over, rate)
            else:
                spans.append(Span(below, rate))
        below = rate
    return spans


def _cheapest(offers: Sequence[Offer], rate: float) -> float:
    return min((offer.cost for offer in offers if offer.rate >= rate), default=inf)
