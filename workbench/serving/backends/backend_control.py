"""Control of a backend between two batches: other weights, a profile."""

from __future__ import annotations

from typing import Protocol


class BackendControl(Protocol):
    """Other weights and profiles. What cannot be done raises ValueError, in one line."""

    def check_weights(self, folder: str) -> None:
        """Raise unless the checkpoint in ``folder`` can take the place of the weights; changes nothing."""
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
