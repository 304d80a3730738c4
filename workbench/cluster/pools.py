"""The pools of a simulated cluster: what each is made of, and what a record says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from backends.simulated.catalogue.gpu_specs import renamed_in_gpu
from backends.simulated.catalogue.power import power_w
from backends.simulated.links import LINKS
from reports.record.meta import PoolMeta
from workbench.cluster.resolve import SimulatedRecipe, resolve
from workbench.recording.of_pools import common, settings_of_all
from workbench.scheduler.config import ConfigError
from workbench.settings.accuracy import accuracy_of
from workbench.settings.fleet_spec import Scaling
from workbench.settings.run_settings import RunSettings


@dataclass(frozen=True)
class SimulatedPool:
    """Instances of one kind."""

    name: str
    count: int
    recipe: SimulatedRecipe
    first: int = 0
    """Number of its first instance in the cluster."""
    given: dict[str, Any] = field(default_factory=dict)
    """Settings that are its own."""
    begins: int = 0
    """How many there are at the beginning, if not all of them."""
    scaling: Scaling | None = None

    @property
    def numbers(self) -> range:
        """Of its instances."""
        return range(self.first, self.first + self.count)

    @property
    def gpus(self) -> int:
        """Number of GPUs of all its instances."""
        return self.count * self.recipe.gpus

    def described(self, more: Mapping[str, Any]) -> PoolMeta:
        """Describe the pool as meta.json has it, with ``more`` that is not the same in all pools."""
        return PoolMeta(
            name=self.name,
            role=self.recipe.role,
            count=self.count,
            first_instance=self.first,
            gpu=self.recipe.gpu.name,
            gpus=self.recipe.gpus,
            settings=self.given,
            power_w=power_w(self.recipe.gpu),
            **used(self.recipe),
            **more,
        )


def renamed_in_gpus(gpus: Iterable[str]) -> list[str]:
    """Notes on keys in the files of GPUs that are called otherwise now, each file once. Raises CatalogueError."""
    return [note for gpu in dict.fromkeys(gpus) for note in renamed_in_gpu(gpu)]


def resolve_pools(settings: RunSettings, loop: str) -> list[SimulatedPool]:
    """Resolve the pools of a run's cluster. Raises what :func:`~workbench.cluster.resolve.resolve` raises; for one of
    several pools a ConfigError that names it."""
    scalings = settings.scalings
    if not settings.pool:
        recipe = resolve(settings, loop)
        return [_scaled(SimulatedPool("both", settings.dp, recipe), scalings.get("both"), settings)]
    pools: list[SimulatedPool] = []
    first = 0
    for pool in settings.pools(loop):
        try:
            recipe = resolve(pool.settings, pool.loop)
        except ValueError as error:  # every error of bad input is one
            raise ConfigError(f"pool {pool.name}: {error}") from error
        found = SimulatedPool(pool.name, pool.count, recipe, first, dict(pool.given))
        pools.append(_scaled(found, scalings.get(pool.name), settings))
        first += pools[-1].count
    _check_kv(pools)
    return pools


def _scaled(pool: SimulatedPool, scaling: Scaling | None, settings: RunSettings) -> SimulatedPool:
    """The pool with as many instances as it may ever have. Raises ConfigError for one whose instances step together and come
    and go."""
    losing = any(failure.pool == pool.name for failure in settings.failures)
    if pool.recipe.lock_step and (scaling is not None or losing):
        name = "fail" if losing else "autoscale"
        raise ConfigError(f"{name}: {pool.name}: its instances share experts (ep) and step together: none can go alone")
    if scaling is None:
        return pool
    return replace(pool, count=scaling.most, begins=pool.count, scaling=scaling)


def _check_kv(pools: Sequence[SimulatedPool]) -> None:
    """Raise ConfigError, which names a pool, where KV that is handed over would be in another dtype on the other side."""
    pairs = [pool for pool in pools if pool.recipe.role != "both"]
    for pool in pairs[1:]:
        if pool.recipe.kv_dtype != pairs[0].recipe.kv_dtype:
            raise ConfigError(
                f"pool {pool.name}: kv_dtype: {pool.recipe.kv_dtype}, but {pairs[0].recipe.kv_dtype} in pool "
                f"{pairs[0].name}; KV is handed over as it is"
            )


def gpus_of(pools: Sequence[SimulatedPool]) -> dict[str, int]:
    """Count the GPUs of each name in a cluster, in the order of its pools."""
    found: dict[str, int] = {}
    for pool in pools:
        name = pool.recipe.gpu.name
        found[name] = found.get(name, 0) + pool.gpus
    return found


def assumed_links(pools: Sequence[SimulatedPool]) -> tuple[str, ...]:
    """Notes on what is assumed of the links between GPUs of a cluster, each once."""
    return tuple(dict.fromkeys(note for pool in pools for note in pool.recipe.notes if note.startswith(LINKS)))


def used(recipe: SimulatedRecipe) -> dict[str, Any]:
    """Settings as an instance uses them in the end."""
    return {
        "loop": recipe.loop.name,
        "tp": recipe.tp,
        "pp": recipe.stages,
        "kv_tokens": recipe.scheduler.kv_tokens,
        "max_context": recipe.scheduler.max_context,
        "dtype": recipe.weights.dtype,
    }


def settings_found(pools: Sequence[SimulatedPool]) -> dict[str, Any]:
    """Collect what a run's settings were in the end, as far as all pools have the same.

    A setting that every pool has of its own, and not the same, is None: that of the run had no effect.
    """
    found = [
        {**used(pool.recipe), "kv_dtype": pool.recipe.kv_dtype, "max_running": pool.recipe.scheduler.max_running}
        for pool in pools
    ]
    return settings_of_all(found, [pool.given for pool in pools])


def modelled(pools: Sequence[SimulatedPool]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Say for a record how instances were modelled: of all of them, and of each pool what is not the same in all."""
    each = [_modelled(pool.recipe) for pool in pools]
    same = common(each)
    return same, [{name: value for name, value in one.items() if name not in same} for one in each]


def _modelled(recipe: SimulatedRecipe) -> dict[str, Any]:
    host = {f.name: getattr(recipe.host, f.name) for f in fields(recipe.host) if f.init}
    return {
        "weights": recipe.weights.described,
        "kv_budget": recipe.kv_budget,
        "cost_notes": [*recipe.notes, *getattr(recipe.cost, "notes", ())],
        "host_model": host,
        "front_end": recipe.front_end and {"engine": recipe.front_end.engine, **asdict(recipe.front_end.model)},
        "parity": recipe.parity,
        "rests_on": recipe.rests_on,
        "accuracy": accuracy_of(recipe.case, recipe.settings, recipe.loop.name),
    }
