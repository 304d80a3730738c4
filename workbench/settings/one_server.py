"""Settings of a cluster that one server of ours has not."""

from __future__ import annotations

NOT_OF_A_SERVER = frozenset({"model", "dp", "pool", "router"})
"""Beside those that do nothing there: instances behind a router, and its argument."""
