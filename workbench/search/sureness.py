"""How sure a plan is of one configuration: by how much predictions like it are off, and what becomes of it then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from workbench.cluster.pools import SimulatedPool, modelled
from workbench.search.both_ends import BothEnds, both_ends
from workbench.search.rate import HighestRate, Simulate
from workbench.search.slo import Limit
from workbench.settings.deploy import Deployed, deploy_commands, our_command
from workbench.settings.run_settings import PoolSettings


@dataclass(frozen=True)
class Sureness:
    """What is known of a configuration beside its numbers."""

    said: Mapping[str, Any] = field(default_factory=dict)
    """``accuracy`` and ``rests_on``, and those of its ``pools``, as a record of a run under it has them."""
    ends: BothEnds | None = None
    deploy: tuple[Deployed, ...] = ()

    @property
    def accuracy(self) -> Mapping[str, Any]:
        """How far off predictions like it were; empty where its pools are not all of one kind."""
        return self.said.get("accuracy") or {}

    @property
    def why_not(self) -> str:
        """Why nothing is known of the ends."""
        return str(self.accuracy.get("why") or "too little was compared, or its pools are of several kinds")

    def to_json(self) -> dict[str, Any]:
        """Give it as plan.json holds it."""
        return {
            "accuracy": dict(self.accuracy),
            "both_ends": asdict(self.ends) if self.ends is not None else None,
            "deploy": [each.to_json() for each in self.deploy],
        }


def sure_parts(pools: Sequence[SimulatedPool]) -> dict[str, Any]:
    """What a record of these pools has of how sure it is: ``accuracy`` and ``rests_on``, or those of its ``pools``."""
    common, own = modelled(pools)
    said: dict[str, Any] = {name: common[name] for name in ("accuracy", "rests_on") if name in common}
    each = [{name: more[name] for name in ("accuracy", "rests_on") if name in more} for more in own]
    return {**said, "pools": [{**more, "name": pool.name} for pool, more in zip(pools, each, strict=True)]}


def how_sure(
    pools: Sequence[SimulatedPool],
    simulate: Simulate,
    limits: Sequence[Limit],
    target: float,
    found: HighestRate,
) -> Sureness:
    """Say it of a configuration that was searched. Runs a simulation or two, at the ends of the band."""
    said = sure_parts(pools)
    accuracy = said.get("accuracy") or {}
    several = len(pools) > 1
    commands = [_commands(pool, pool.name if several else "") for pool in pools]
    ours = [_our_command(pools)] if several else []
    lost = found.refused is not None and found.refused.everything
    ends = None if lost else both_ends(simulate, limits, target, bool(found.target_kept), accuracy)
    return Sureness(said, ends, (*ours, *chain(*zip(*commands, strict=True))))


def _our_command(pools: Sequence[SimulatedPool]) -> Deployed:
    """The one command that starts all pools with us."""
    each = [
        PoolSettings(
            pool.name, pool.recipe.role, pool.begins or pool.count, pool.recipe.settings, pool.recipe.loop.name
        )
        for pool in pools
    ]
    return our_command(each)


def _commands(pool: SimulatedPool, name: str) -> list[Deployed]:
    recipe = pool.recipe
    return deploy_commands(
        recipe.settings, recipe.loop.name, recipe.scheduler.kv_tokens, recipe.model.experts > 0, name
    )
