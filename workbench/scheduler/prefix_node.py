"""A node of the prefix tree: what a request locks, and what policies and preemption look at."""

from __future__ import annotations

import numpy as np


class Node:
    """An edge and its end: the tokens from the parent to here and the pages that hold their KV."""

    __slots__ = ("children", "created", "hits", "key", "last_access", "locks", "pages", "parent", "queued")

    def __init__(self, key: np.ndarray, pages: np.ndarray, parent: Node | None, tick: int) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[int | bytes, Node] = {}
        self.locks = 0
        self.hits = 0
        self.created = tick
        self.last_access = tick
        self.queued = False
        """Has an entry in the eviction heap."""
