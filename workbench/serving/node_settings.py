"""Settings of a server whose model several machines hold, and where each of these stands."""

from __future__ import annotations

from dataclasses import dataclass

from backends.node_place import NodePlace
from workbench import __version__
from workbench.handover.addresses import split_address
from workbench.scheduler.config import ConfigError
from workbench.scheduler.settings import setting
from workbench.serving.listen_settings import SERVER
from workbench.serving.peer_keys import shared_key
from workbench.settings.loading import SETTINGS
from workbench.settings.run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Settings of one machine among several; ``nodes`` of the run says how many."""

    rendezvous: str | None = setting(
        None,
        group=SERVER,
        help="HOST:PORT of node 0, where the machines that hold a real model (nodes) meet. Node 0 listens on that address "
        "alone.",
    )
    node_rank: int = setting(
        0,
        least=0,
        group=SERVER,
        help="Which of the nodes this machine is: 0 has HTTP and the scheduler, the others their ranks of the model. "
        "Default {default}.",
    )
    node_wait_s: float = setting(
        300.0,
        above=0,
        group=SERVER,
        flag="node-wait",
        help="Seconds that nodes may take to come together. Default {default}.",
    )

    def check_nodes(self, nodes: int, modelled: bool) -> None:
        """Raise ConfigError where these do not go with so many nodes, of a model that is real or not."""
        several = {
            "rendezvous": self.rendezvous is not None,
            "node_rank": self.node_rank > 0,
            "node_wait": self.node_wait_s != NodeSettings.node_wait_s,
        }
        if nodes == 1 or modelled:
            for name in (name for name, given in several.items() if given):
                if modelled:
                    raise ConfigError(
                        f"{name}: is of machines that hold a real model; a modelled one's are modelled, too"
                    )
                raise ConfigError(f"{name}: is of several machines; --nodes says how many")
            return
        if self.rendezvous is None:
            raise ConfigError(f"rendezvous: {nodes} nodes have to meet somewhere; say HOST:PORT of node 0")
        if self.node_rank >= nodes:
            raise ConfigError(f"node_rank: {self.node_rank}; {nodes} nodes are 0 to {nodes - 1}")
        _host_and_port(self.rendezvous)

    def place(
        self, run: RunSettings, nodes: int, loading: dict[str, str], key: str | None, silent_s: float
    ) -> NodePlace:
        """Return where this machine stands. ``loading`` are settings beside the run's by which the model is loaded.

        Raises ConfigError without a key.
        """
        assert self.rendezvous is not None
        host, port = _host_and_port(self.rendezvous)
        # What HTTP goes by matters on node 0 alone.
        same = {**{name: getattr(run, name) for name in SETTINGS}, **loading, "version of workbench": __version__}
        return NodePlace(
            count=nodes,
            rank=self.node_rank,
            host=host,
            port=port,
            key=shared_key(key, host),
            wait_s=self.node_wait_s,
            silent_s=silent_s,
            settings=tuple(sorted(same.items())),
        )


def _host_and_port(rendezvous: str) -> tuple[str, int]:
    """Read HOST:PORT; an IPv6 address stands in brackets. Raises ConfigError."""
    try:
        host, port = split_address(rendezvous)
    except ValueError:
        raise ConfigError(f"rendezvous: {rendezvous!r} is not HOST:PORT") from None
    if ":" in host and not rendezvous.startswith("["):
        raise ConfigError(f"rendezvous: {rendezvous!r}: an IPv6 address stands in brackets, as in [::1]:29500")
    return host, port
