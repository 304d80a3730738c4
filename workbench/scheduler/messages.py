"""What the outside says to a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Generate:
    """A new request."""

    rid: str
    prompt: np.ndarray
    """int32[input tokens]."""
    params: SamplingParams
    arrival_s: float = 0.0
    priority: int = 0
    namespace: str = ""
    slo_ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request wherever it is. Unknown and finished ids are ignored: the client cannot know."""

    rid: str
    why: str = "client"


@dataclass(frozen=True, slots=True)
class Stop:
    """End a request as finished: its text holds a stop string, which only the outside can see."""

    rid: str


@dataclass(frozen=True, slots=True)
class FlushCache:
    """Forget every prefix that no running request uses."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Form no new batches; what is in flight is processed."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Undo :class:`Pause`."""


@dataclass(frozen=True, slots=True)
class GetState:
    """Ask how the scheduler stands; ``tell`` is called with it (:meth:`Scheduler.snapshot`)."""

    tell: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class SetState:
    """Change settings (``config.CHANGEABLE``) from the next batch on, all or none; ``tell`` gets why not, or None."""

    settings: Mapping[str, object]
    tell: Callable[[str | None], None]


Message = Generate | Abort | Stop | FlushCache | Pause | Resume | GetState | SetState
