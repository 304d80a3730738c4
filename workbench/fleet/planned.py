"""The instances of a fleet: what each is started with, and the router before them."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.routing.route_settings import RouteSettings
from workbench.scheduler.config import ConfigError, Role
from workbench.scheduler.settings import settings_of
from workbench.serving.backends.backend_spec import BACKEND_SETTINGS, backend_spec
from workbench.serving.listen_settings import ListenSettings
from workbench.serving.serve_settings import ServeSettings
from workbench.settings.run_settings import RunSettings

OF_ONE = ("role", "peer_host", "peer_port", "rendezvous", "node_rank", "node_wait_s")
"""Settings of a server that several on one machine cannot share."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Planned:
    """One instance that is to be started."""

    pool: str
    number: int
    """Of the instance in its pool, from 0."""
    settings: ServeSettings
    gpus: str | None = None
    """What its CUDA_VISIBLE_DEVICES is to be; None: as it is."""

    @property
    def name(self) -> str:
        """Name of the instance, as ``--fail`` has it."""
        return f"{self.pool}.{self.number}"

    @property
    def role(self) -> Role:
        return self.settings.role


@dataclass(frozen=True)
class FleetSettings:
    """Everything that a fleet is started with.

    Raises ConfigError for what cannot work.
    """

    run: RunSettings
    server: Mapping[str, Any]
    """What was said of a server, by the names of :class:`ServeSettings`; ``backend`` is one for this machine."""
    command: str = ""
    listens: ListenSettings = field(init=False)
    """What was said of what listens: the router's, not the instances'."""

    def __post_init__(self) -> None:
        declared, of_listener = settings_of(ServeSettings), settings_of(ListenSettings)
        said = {name: value for name, value in self.server.items() if name in of_listener}
        object.__setattr__(self, "listens", ListenSettings(**said))
        for name in OF_ONE:
            if name in self.server and self.server[name] != declared[name].default:
                flag = declared[name].flag or name
                raise ConfigError(f"{flag}: is of one server, and this starts {self.run.instances} behind a router")
        if len(self.run.loops) != 1:
            raise ConfigError(f"loop: a server runs one loop, not {self.run.loop!r}")
        real = backend_spec(**{name: self.server[name] for name in BACKEND_SETTINGS if name in self.server}).has_weights
        for nodes in {pool.settings.nodes or 1 for pool in self.run.pools(self.loop)} - {1} if real else ():
            raise ConfigError(f"nodes: {nodes}; instances that are started together are on this machine")
        if any(pool.settings.ep > pool.settings.tp for pool in self.run.pools(self.loop)):
            raise ConfigError("ep: instances that share experts step together, which those of servers do not")

    @property
    def loop(self) -> str:
        return self.run.loops[0]

    @property
    def record(self) -> Path | None:
        return self.server.get("record")

    def route(self, urls: Mapping[Role, Sequence[str]]) -> RouteSettings:
        """Return the settings of the router before instances at these URLs."""
        return RouteSettings(
            **vars(self.listens),
            worker=tuple(urls["both"]),
            prefill=tuple(urls["prefill"]),
            decode=tuple(urls["decode"]),
            worker_api_key=self.listens.api_key,
            router=self.run.router,
            decode_router=self.run.decode_router,
        )

    def instances(self) -> list[Planned]:
        """Return the instances, numbered over the pools in the order in which these were given.

        Raises ConfigError, which names a pool, for what a server cannot run.
        """
        own = {name: value for name, value in self.server.items() if name not in settings_of(ListenSettings)}
        own |= {"host": LOOPBACK, "port": 0, "command": self.command}
        # What is one server's business is asked there, with the key that the router has.
        shared = ("api_key", "max_body_bytes", "drain_timeout_s")
        own |= {name: self.server[name] for name in shared if name in self.server}
        own["peer_key"] = self.server.get("peer_key") or secrets.token_hex(16)
        for name in ("record", "record_content") if self.record is not None else ():
            own.pop(name, None)  # each leaves a part
        found: list[Planned] = []
        for pool in self.run.pools(self.loop):
            alone = dataclasses.replace(
                pool.settings, dp=1, router=RunSettings.router, decode_router=RunSettings.decode_router, role="both"
            )
            try:
                settings = ServeSettings(alone, role=pool.role, **own)
            except ConfigError as error:
                of_server = str(error).partition(":")[0] in settings_of(ServeSettings)
                of_pool = "" if of_server or not self.run.pool else f"pool {pool.name}: "
                raise ConfigError(f"{of_pool}{error}") from None
            found += [Planned(pool.name, number, settings) for number in range(pool.count)]
        return found


def with_gpus(planned: Sequence[Planned], visible: Sequence[str]) -> list[Planned]:
    """Deal out the GPUs that are visible, as many to each instance as its ranks are. Raises ConfigError when there are too
    few."""
    needed = [tp * pp for each in planned for tp, pp in [each.settings.run.layout(each.settings.loop)]]
    if sum(needed) > len(visible):
        of = " + ".join(map(str, needed))
        raise ConfigError(f"pool: {len(planned)} instances take {of} = {sum(needed)} GPUs, there are {len(visible)}")
    dealt, free = [], iter(visible)
    for each, count in zip(planned, needed, strict=True):
        dealt.append(dataclasses.replace(each, gpus=",".join(next(free) for _ in range(count))))
    return dealt


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(number) for number in range(count)] if said is None else said.split(",")[:count]
