"""One instance: a scheduler, its loop and a backend between two mailboxes, put together in one place for all runs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from workbench.backend import Backend, Inbox, Outbox, Wait, Wire
from workbench.loops import find_loop
from workbench.scheduler.config import Role, SchedulerConfig
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler
from workbench.scheduler.disaggregated.prefill_scheduler import PrefillScheduler
from workbench.scheduler.scheduler import Scheduler
from workbench.scheduler.settings import ConfigError, is_own

SCHEDULERS: dict[Role, type[Scheduler]] = {"both": Scheduler, "prefill": PrefillScheduler, "decode": DecodeScheduler}


@dataclass(frozen=True)
class LoopSpec:
    """A loop by name, and what is asked of it."""

    name: str
    """One of ``workbench.loops.LOOPS``, or ``module:function``."""
    overlap_prefills: bool = True
    """Of the overlap loop: choose and launch a prefill while the one before it runs."""

    def begin(
        self, scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox, wire: Wire | None = None
    ) -> Generator[Wait, None, None]:
        """The loop over these, at its beginning: that of the scheduler's role."""
        role = scheduler.config.role
        asked: dict[str, Any] = {}
        if self.name == "overlap" and role != "decode":
            asked = {"overlap_prefills": self.overlap_prefills}
        others = () if role == "both" else (wire,)
        loop: Generator[Wait, None, None] = find_loop(self.name, role)(
            scheduler, backend, inbox, outbox, *others, **asked
        )
        return self._unending(loop) if is_own(self.name) else loop

    def _unending(self, loop: Generator[Wait, None, None]) -> Generator[Wait, None, None]:
        """A loop of one's own. Raises ConfigError where it ends, for whoever waits for it would wait for ever."""
        yield from loop
        raise ConfigError(f"loop: {self.name!r} ended; a loop goes on for ever")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Parts of an instance, whatever its backend. Recipes of one kind of backend add what that takes."""

    loop: LoopSpec
    scheduler: SchedulerConfig
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence which does not ignore them."""
    stages: int = 1
    """Parts that the model is cut into, each on GPUs of its own."""

    @property
    def role(self) -> Role:
        """What the instance is there for."""
        return self.scheduler.role

    @property
    def rows(self) -> int:
        """Rows of the scheduler's table."""
        return self.scheduler.rows


@dataclass(frozen=True)
class Instance:
    """An instance that has been started: ``loop`` runs once somebody drives it."""

    recipe: Recipe
    scheduler: Scheduler
    backend: Backend
    inbox: Inbox
    outbox: Outbox
    loop: Generator[Wait, None, None]


def start(
    recipe: Recipe,
    backend: Backend,
    mailboxes: Callable[[Scheduler], tuple[Inbox, Outbox]],
    now_s: Callable[[], float] | None = None,
    wire: Wire | None = None,
) -> Instance:
    """Start an instance on a backend that is at rest. ``mailboxes`` makes its inbox and outbox, which may look at the
    scheduler; ``now_s`` is the scheduler's clock (None: it stands at 0, so nothing is timed out). An instance that prefills
    or decodes alone has a ``wire`` to its counterparts.
    """
    assert (wire is None) == (recipe.role == "both"), "only halves of a pair have a wire"
    clock = now_s or (lambda: 0.0)
    scheduler = SCHEDULERS[recipe.role](recipe.scheduler, eos_token_ids=recipe.eos_token_ids, clock=clock)
    inbox, outbox = mailboxes(scheduler)
    loop = recipe.loop.begin(scheduler, backend, inbox, outbox, wire)
    return Instance(recipe, scheduler, backend, inbox, outbox, loop)
