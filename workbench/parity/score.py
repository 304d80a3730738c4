"""Counts of equal decisions, and their place beside the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ground.json_file import read_json, write_json
from workbench.parity.decide import Replayed
from workbench.parity.recording import Recording
from workbench.settings.parity import COUNTS


@dataclass
class Score:
    """How much of a recording is decided alike."""

    scenarios: int = 0
    equal: int = 0
    steps: int = 0
    equal_steps: int = 0
    """Before the first difference of each scenario."""

    def add(self, replayed: Replayed) -> None:
        """Count one scenario."""
        self.scenarios += 1
        self.equal += replayed.equal
        self.steps += len(replayed.recorded)
        self.equal_steps += replayed.equal_steps

    def __str__(self) -> str:
        share = math.floor(1000 * self.equal_steps / max(self.steps, 1)) / 10  # never 100 unless all are
        return (
            f"{self.equal} of {self.scenarios} scenarios equal; {self.equal_steps} of {self.steps} steps before the first "
            f"difference ({share:g} %)"
        )


def keep_score(recording: Recording, score: Score) -> None:
    """Note the counts of a whole recording beside the presets."""
    counts = read_json(COUNTS)
    counts.setdefault(recording.preset, {})[recording.path.name] = asdict(score)
    write_json(COUNTS, {preset: dict(sorted(of.items())) for preset, of in counts.items()}, sort_keys=True)
