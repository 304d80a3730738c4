"""Messages from the outside to a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.scheduler.grammar import Grammar
from workbench.scheduler.request import Pair, SamplingParams


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
    session: str = ""
    """The open session it continues: the session's tokens come before ``prompt``."""
    bos_tokens: int = 0
    """Leading tokens of ``prompt`` that begin a text (BOS): left out where the session has tokens."""
    grammar: Grammar | None = None
    """What it may write; None: anything."""
    refused: str = ""
    """Why it cannot be served, as whoever sends it has found out; empty: nothing is known against it."""
    pair: Pair | None = None
    """The instance that does the other half of it, where instances prefill or decode alone."""
    written_tokens: int = 0
    """How many of ``prompt``, the last ones, are its output so far: it has lost its KV where it is decoded."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request wherever it is. Unknown and finished ids are ignored: the client cannot know."""

    rid: str
    why: str = "client"


@dataclass(frozen=True, slots=True)
class Stop:
    """End a request as finished: its text holds a stop string, which only the outside can see."""

    rid: str
    output_tokens: int | None = None
    """Its output up to the stop: where a session continues it, later tokens are left out. None: all it was given."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Begin a session; ``tell`` gets why not, or None."""

    session: str
    tell: Callable[[str | None], None]


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Forget a session, while a request of it goes on; ``tell`` gets why not, or None."""

    session: str
    tell: Callable[[str | None], None]


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


@dataclass(frozen=True, slots=True)
class UpdateWeights:
    """Go on with other weights. No batch is formed until nothing is in flight; then whoever holds KV goes back to the queue
    with the tokens it has, and the prefix cache is emptied: the new weights would have computed other KV.

    ``tell`` gets None once that is done, or why it is not: then nobody has lost anything.
    """

    check: Callable[[], None]
    """Look at the new weights without changing anything. Raises ValueError, in one line, where they cannot be taken."""
    write: Callable[[], None]
    """Put them in the place of the old ones. What it raises ends the loop: half-written weights serve nobody."""
    tell: Callable[[str | None], None]


@dataclass(frozen=True, slots=True)
class Profile:
    """Have what runs the batches begin or end a profile, between two of them; ``tell`` gets why not, or None."""

    act: Callable[[], None]
    """Raises ValueError, in one line, where it cannot be done."""
    tell: Callable[[str | None], None]


Message = (
    Generate
    | Abort
    | Stop
    | OpenSession
    | CloseSession
    | FlushCache
    | Pause
    | Resume
    | GetState
    | SetState
    | UpdateWeights
    | Profile
)
