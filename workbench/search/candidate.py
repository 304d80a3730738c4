"""What a plan chooses from: configurations, each with what its search found, and the load that they are to carry."""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.search.point import FINISHED
from workbench.search.rate import HighestRate
from workbench.search.space import Point
from workbench.search.sureness import Sureness


@dataclass(frozen=True)
class Load:
    """The load of the trace."""

    arrivals: int
    """Requests, or sessions, that come on their own."""
    requests: int
    """All of them, with the later turns of sessions."""
    own_rate: float | None
    """Arrivals/s of the trace as it is; None when all come at the same time."""
    target: float
    """Arrivals/s to carry."""


@dataclass(frozen=True)
class Candidate:
    """One configuration and what it can do."""

    point: Point
    status: str
    reason: str = ""
    gpu: str = ""
    gpus: int = 0
    cost_per_hour: float | None = None
    found: HighestRate | None = None
    command: str = ""
    pools: tuple[str, ...] = ()
    """As ``--pool`` takes them."""
    shared_requests: bool = False
    """Whether some of its instances prefill and others decode."""
    links: tuple[str, ...] = ()
    """What is assumed of links that its GPUs wait for."""
    sure: Sureness = field(default_factory=Sureness)
    """What the search says of its chances, and what starts it."""

    @property
    def carries(self) -> bool:
        """Whether it keeps the SLO at the target, of as many requests as any other can serve."""
        return self.status == FINISHED and self.found is not None and bool(self.found.target_kept)

    def margin(self, target: float) -> float:
        """Compute how far the highest rate lies above the target; 0.25 is a quarter."""
        return self.found.rate / target - 1 if self.found is not None else -1.0

    @property
    def price(self) -> float:
        """An hour's cost; without prices, the number of GPUs."""
        return self.cost_per_hour if self.cost_per_hour is not None else float(self.gpus)
