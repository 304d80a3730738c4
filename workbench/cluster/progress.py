"""Progress of a run, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, int, int], None]
"""Called a few times a second with the seconds of the run, requests ended, and iterations."""
PROGRESS_EVERY_S = 0.1
