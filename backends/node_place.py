"""A machine's place among the several that hold one model between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NodePlace:
    """Place of a node: node 0 has the scheduler and listens, the others come to it."""

    count: int
    """Number of nodes."""
    rank: int
    """Of this one, from 0."""
    host: str
    """Where node 0 listens, and on nothing else."""
    port: int
    key: bytes
    """Known to all nodes: both ends of a connection show the other that they have it."""
    wait_s: float = 300.0
    """How long the nodes may take to come together."""
    silent_s: float = 60.0
    """A node that has not been heard of for so long has failed."""
    settings: tuple[tuple[str, Any], ...] = ()
    """What has to be the same on all nodes, by name."""

    @property
    def where(self) -> str:
        """Write the rendezvous as ``--rendezvous`` takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
