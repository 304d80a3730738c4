"""Settings of a fleet: instances that are lost, and pools whose number of instances follows the load."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.scheduler.settings import HARDWARE, Place, setting
from workbench.settings.fleet_spec import (
    Failure,
    Scaling,
    parse_failures,
    parse_scalings,
    texts_of,
)

_ONE_INSTANCE: dict[Place, str] = {"live": "instances that come and go are simulated"}


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """Settings of how many instances there are over time."""

    fail: tuple[str, ...] | None = setting(
        None,
        group=HARDWARE,
        help="Lose an instance: POOL.N:at=60s,for=30s, N from 0 in its pool; without for it stays gone. What it held is "
        "sent once more if no token was out, else lost. Repeatable.",
        read=texts_of("fail", parse_failures),
        idle=_ONE_INSTANCE,
    )
    autoscale: tuple[str, ...] | None = setting(
        None,
        group=HARDWARE,
        help="Let a pool follow the load: POOL:min=1,max=8 and, with commas, signal=queue|kv|slo, target=4, every=5s, "
        "start=60s, drain=30s, cool-down=60s. Repeatable.",
        read=texts_of("autoscale", parse_scalings),
        idle=_ONE_INSTANCE,
    )

    @property
    def failures(self) -> list[Failure]:
        return parse_failures(self.fail or ())

    @property
    def scalings(self) -> dict[str, Scaling]:
        """By the name of the pool."""
        return {scaling.pool: scaling for scaling in parse_scalings(self.autoscale or ())}
