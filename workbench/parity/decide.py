"""Replays of recorded scenarios, and the first difference between two lists of decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.instance import Recipe, start
from workbench.parity.recording import Recording, Scenario
from workbench.parity.scenarios import scenario
from workbench.parity.steps import Decision, DecisionOutbox, StepBackend, StepInbox
from workbench.scheduler.scheduler import Scheduler

Look = Callable[[Scheduler, StepInbox, Decision], None]
"""Is shown the scheduler after every decision."""


@dataclass(frozen=True)
class Replayed:
    """One scenario, decided twice."""

    scenario: Scenario
    recorded: Sequence[Decision]
    ours: Sequence[Decision]

    @property
    def equal_steps(self) -> int:
        """Batches before the first difference."""
        pairs = zip(self.recorded, self.ours, strict=False)
        return next((at for at, (one, other) in enumerate(pairs) if one != other), self.shorter)

    @property
    def shorter(self) -> int:
        return min(len(self.recorded), len(self.ours))

    @property
    def equal(self) -> bool:
        return self.recorded == self.ours


def replay(recording: Recording, key: str, look: Look | None = None) -> Replayed:
    """Play a recorded scenario under the preset that belongs to it. Raises RecordingError and ConfigError."""
    played = recording.scenario(key)
    return Replayed(played, recording.decisions[key], decide(played, look))


def decide(played: Scenario, look: Look | None = None) -> list[Decision]:
    """The decisions of this project's scheduler and loop in a scenario, without a model or a clock."""
    inbox = StepInbox(scenario(played.case_name, played.seed), ignore_eos=played.ignore_eos)

    def mailboxes(scheduler: Scheduler) -> tuple[StepInbox, DecisionOutbox]:
        def launched(decision: Decision) -> None:
            if look is not None:
                look(scheduler, inbox, decision)

        return inbox, DecisionOutbox(launched, inbox.end if played.token_too_early else None)

    instance = start(Recipe(loop=played.loop, scheduler=played.config), StepBackend(), mailboxes)
    for _ in instance.loop:
        if inbox.over:
            break
    outbox = instance.outbox
    assert isinstance(outbox, DecisionOutbox)
    return outbox.decisions
