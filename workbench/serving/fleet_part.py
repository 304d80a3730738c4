"""What makes the record of a server a part of one of several servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FleetPart:
    """What the instances of a fleet have in common for their records."""

    epoch_s: float
    """Their times count from this moment of the machine's monotonic clock."""
    hash_key: bytes
    """Key of the hashes of prompts in traces without content, kept nowhere."""
