"""What a plan says of its choice at both ends of the band."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reports.metrics.labels import percent
from workbench.search.candidate import Candidate


def stands(candidates: Sequence[Candidate], named: Callable[[Candidate], str]) -> list[str]:
    """Say whether the choice, the first of the ranked candidates, stands at the slow and at the fast end of the band.
    ``named`` writes a candidate with what it costs."""
    best = candidates[0]
    if best.found is None:
        return []
    return [*_slow(candidates, named), *_fast(candidates, named)]


def _slow(candidates: Sequence[Candidate], named: Callable[[Candidate], str]) -> list[str]:
    best = candidates[0]
    if best.sure.ends is None:
        return [f"Whether that stands where predictions err is not known: {best.sure.why_not}."]
    ends = best.sure.ends
    at = f"At the slow end of the band ({_longer(ends.slow)})"
    if not best.carries:
        return []
    if ends.slow_kept:
        return [f"{at} it keeps the SLO, too."]
    others = [one for one in candidates[1:] if one.carries and one.sure.ends is not None and one.sure.ends.slow_kept]
    if not others:
        return [f"{at} it does not keep the SLO, nor does anything else that was searched."]
    return [
        f"{at} it does not keep the SLO; the cheapest that then does is {named(min(others, key=lambda o: o.price))}."
    ]


def _fast(candidates: Sequence[Candidate], named: Callable[[Candidate], str]) -> list[str]:
    best = candidates[0]
    if best.sure.ends is None:
        return []
    at = f"At the fast end ({_longer(best.sure.ends.fast)})"
    cheaper = [
        one
        for one in candidates
        if not one.carries and one.sure.ends is not None and one.sure.ends.fast_kept
        if not best.carries or one.price < best.price
    ]
    if cheaper:
        also = "would do, too" if best.carries else "would do"
        return [f"{at} {named(min(cheaper, key=lambda one: one.price))} {also}."]
    return [f"{at} nothing cheaper does." if best.carries else f"{at} nothing that was searched does either."]


def _longer(factor: float) -> str:
    """How much longer requests take than predicted, in words."""
    share = percent(abs(factor - 1))
    return f"requests take {share} {'longer' if factor >= 1 else 'less'} than predicted"
