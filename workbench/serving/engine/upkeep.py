"""What may be done to a backend between two batches, beside running them."""

from __future__ import annotations

from typing import Protocol


class Upkeep(Protocol):
    """What cannot be done raises ValueError, in one line."""

    def check_weights(self, folder: str) -> None:
        """Look whether the checkpoint in ``folder`` can take the place of the weights; changes nothing."""
        ...

    def write_weights(self) -> None:
        """Put the weights that were looked at last in their place. What it raises leaves the backend unusable."""
        ...

    def start_profile(self, folder: str, steps: int | None) -> None:
        """Profile from the next batch on, into ``folder``; ``steps`` None: until it is stopped."""
        ...

    def stop_profile(self) -> list[str]:
        """Write the profile and return its files."""
        ...


class ModelledGPU:
    """Has neither weights nor anything that a profiler could see."""

    def check_weights(self, folder: str) -> None:
        raise ValueError("the simulated backend has no weights to update")

    def write_weights(self) -> None:
        raise AssertionError("there is nothing that could have been checked")

    def start_profile(self, folder: str, steps: int | None) -> None:
        raise ValueError(
            "the simulated backend has no device to profile; the timeline of the report that --record leaves has its steps"
        )

    def stop_profile(self) -> list[str]:
        raise ValueError("no profile is running")
