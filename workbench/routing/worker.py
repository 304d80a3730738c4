"""A worker as its router sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workbench.routing.circuit import Circuit
from workbench.routing.connection import Header
from workbench.routing.upstream import Upstream
from workbench.scheduler.config import Role


@dataclass(eq=False)
class Worker:
    """One server, by the ``number`` that it keeps for good."""

    number: int
    url: str
    role: Role
    upstream: Upstream
    circuit: Circuit
    api_key: str | None = None
    healthy: bool | None = None
    """None before the first look."""
    failed_looks: int = 0
    """In a row."""
    why: str = ""
    """What is wrong with it, in a few words."""
    accepted: tuple[Any, ...] | None = None
    """What of it has to be alike in a pair, when it was last found to go with the others."""
    refused: str = ""
    """Why it can never be used here; empty: it can."""
    draining: bool = False
    """It gets nothing new, and goes when it has nothing under way."""
    running: int = 0
    """Requests under way."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Cards of the models that it serves, by their ids; empty where it does not say."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a server of ours says of itself (``/server_info``); empty for another's."""

    @property
    def usable(self) -> bool:
        """Whether a request may be sent to it now."""
        return bool(self.healthy) and not self.draining and not self.refused and self.circuit.lets_through

    @property
    def state(self) -> str:
        """How it stands, in a word."""
        if self.refused:
            return "refused"
        if self.draining:
            return "draining"
        return {None: "unknown", True: "healthy", False: "unhealthy"}[self.healthy]

    @property
    def authorization(self) -> list[Header]:
        """The header with its key, if it has one."""
        return [] if self.api_key is None else [(b"authorization", b"Bearer " + self.api_key.encode())]
