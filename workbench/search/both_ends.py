"""Whether a configuration keeps an SLO at both ends of the band in which predictions like its own lie.

A system in which everything takes f times as long, at a rate r, is this one at the rate r f with a clock that goes f times
as slowly: so one run tells, at another rate and with other limits. How fast it is as a whole is what E2E says; each limit
has the band of its own latency, and that of E2E where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports.metrics.how_sure import Band, bands_of
from workbench.search.rate import Simulate
from workbench.search.slo import Limit, judge

BAND_OF = {"ttft": "ttft", "queue": "ttft", "tpot": "tpot", "itl": "tpot", "e2e": "e2e"}
"""By which band a latency is."""


@dataclass(frozen=True)
class BothEnds:
    """What becomes of a configuration at the ends of its band."""

    slow: float
    """How many times as long everything takes at the slow end, 1.25 for a quarter more; at the fast one ``fast``."""
    fast: float
    slow_kept: bool
    fast_kept: bool


def both_ends(
    simulate: Simulate, limits: Sequence[Limit], target: float, kept: bool, accuracy: Mapping[str, Any]
) -> BothEnds | None:
    """Simulate the end that is in question: the slow one of a configuration that has ``kept`` the SLO at the ``target``
    rate, the fast one of another. None where nothing like it was compared."""
    bands = bands_of({"accuracy": accuracy})
    if "e2e" not in bands:
        return None
    whole = bands["e2e"]
    slow, fast = 1 / (1 + whole.low), 1 / (1 + whole.high)
    decided = _kept(simulate, limits, target, bands, "low" if kept else "high")
    # Who keeps it as predicted keeps it when all goes faster, and who does not, does not when all goes slower: unless the
    # whole band lies on one side, and the prediction itself outside of it.
    if kept and fast > 1:
        return BothEnds(slow, fast, decided, _kept(simulate, limits, target, bands, "high"))
    if not kept and slow < 1:
        return BothEnds(slow, fast, _kept(simulate, limits, target, bands, "low"), decided)
    return BothEnds(slow, fast, decided, True) if kept else BothEnds(slow, fast, False, decided)


def _kept(simulate: Simulate, limits: Sequence[Limit], target: float, bands: Mapping[str, Band], end: str) -> bool:
    factor = 1 / (1 + getattr(bands["e2e"], end))
    own = [
        replace(limit, limit_s=limit.limit_s * (1 + getattr(bands.get(BAND_OF[limit.latency], bands["e2e"]), end)))
        for limit in limits
    ]
    return judge(simulate(target * factor, None), own).kept
