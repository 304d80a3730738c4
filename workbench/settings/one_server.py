"""Settings of a run that a server of ours is not told by flags."""

from __future__ import annotations

NOT_OF_A_SERVER = frozenset({"model"})
"""Beside those that do nothing there: its argument."""
