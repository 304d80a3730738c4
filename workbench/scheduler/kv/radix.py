"""A radix tree over token sequences whose nodes own KV pages.

Keys are cut into pages: an edge holds whole pages of tokens, a child is found by the tokens of its first page, and every
namespace has a root of its own. Counters are in pages; the cache around it speaks of tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from workbench.scheduler.prefix_node import Node

Priority = tuple[int, ...]
EVICTION: dict[str, Callable[[Node], Priority]] = {
    "lru": lambda node: (node.last_access,),
    "lfu": lambda node: (node.hits, node.last_access),
    "fifo": lambda node: (node.created,),
}
"""Lowest goes first."""


class RadixTree:
    """Matching, insertion, locks and eviction. It never allocates or frees a page: callers do, with what it returns."""

    def __init__(self, page_size: int, evict: str = "lru", *, touch_part: bool = True) -> None:
        """``touch_part``: whether a match that ends inside a node is a use of it."""
        self.page_size = page_size
        self._touch_part = touch_part
        self.evictable_pages = 0
        self.protected_pages = 0
        self._roots: dict[str, Node] = {}
        self._priority = EVICTION[evict]
        self._heap: list[tuple[Any, ...]] = []
        """(priority, number of the entry, node), the priority's numbers spelled out: comparing nested tuples is slow."""
        self._entry = 0
        self._tick = 0

    def match(self, tokens: np.ndarray, namespace: str = "", *, touch: bool = True) -> tuple[Node | None, int]:
        """Walk down as far as ``tokens`` (whole pages of them) agree.

        Returns the node reached, split so that it ends where the match does, and the matched length in tokens; (None, 0)
        for a namespace never seen. ``touch=False`` changes nothing, neither recency nor shape: it only measures, and then
        the node may extend past the match.
        """
        node = self._roots.get(namespace)
        if node is None:
            return None, 0
        if touch:
            self._tick += 1
        return self._descend(node, 0, tokens, touch)

    def path_pages(self, node: Node | None) -> np.ndarray:
        """int32: pages from the root down to ``node``."""
        parts = []
        while node is not None and node.parent is not None:
            parts.append(node.pages)
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else np.empty(0, np.int32)

    def insert(
        self, tokens: np.ndarray, pages: np.ndarray, namespace: str = "", *, lock: bool = False
    ) -> tuple[Node, int]:
        """Add a sequence of whole pages. Returns its last node, with ``lock`` locked, and how many leading pages the tree
        already had.

        The tree takes over ``pages[had:]``; ``pages[:had]`` stay the caller's (they may be the tree's own or duplicates).
        """
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(np.empty(0, np.int32), np.empty(0, np.int32), None, 0)
        return self.extend(root, 0, tokens, pages, lock=lock)

    def extend(
        self, node: Node, depth: int, tokens: np.ndarray, pages: np.ndarray, *, lock: bool = False
    ) -> tuple[Node, int]:
        """:meth:`insert` of a sequence whose first ``depth`` tokens end at ``node``: only what follows is compared."""
        self._tick += 1
        above = node
        while above.parent is not None:
            above.last_access = self._tick
            above.hits += 1
            above = above.parent
        node, matched = self._descend(node, depth, tokens, True)
        had = matched // self.page_size
        if matched < len(tokens):
            # Copies: a view would keep the whole row of the caller alive, and see it change.
            leaf = Node(tokens[matched:].copy(), pages[had:].copy(), node, self._tick)
            node.children[self._child_key(tokens, matched)] = leaf
            self.evictable_pages += len(leaf.pages)
            node = leaf
            if not lock:
                self._queue(leaf)
        if lock:
            self.lock(node)
        return node, had

    def lock(self, node: Node | None) -> None:
        """Protect ``node`` and its ancestors from eviction."""
        while node is not None:
            if node.locks == 0:
                self.evictable_pages -= len(node.pages)
                self.protected_pages += len(node.pages)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one :meth:`lock`."""
        leaf = node
        while node is not None:
            node.locks -= 1
            assert node.locks >= 0, "a node was unlocked more often than locked"
            if node.locks == 0:
                self.evictable_pages += len(node.pages)
                self.protected_pages -= len(node.pages)
            node = node.parent
        if leaf is not None:
            self._queue(leaf)

    def evict(self, count: int) -> list[np.ndarray]:
        """Drop unlocked leaves until ``count`` pages are free or none is left; returns the dropped leaves' pages.

        A heap with stale entries: a node has at most one, and one whose priority has changed since it was pushed is pushed
        again when it comes up. So a hit costs nothing here and an eviction costs a logarithm, whatever the tree's size.
        """
        freed: list[np.ndarray] = []
        heap = self._heap
        while count > 0 and heap:
            *priority, _, node = heapq.heappop(heap)
            node.queued = False
            if node.locks or node.children or node.parent is None:
                continue  # it is queued again when it is unlocked, or loses its last child
            if tuple(priority) != self._priority(node):
                self._queue(node)
                continue
            freed.append(node.pages)
            count -= len(node.pages)
            self.evictable_pages -= len(node.pages)
            parent = node.parent
            del parent.children[self._child_key(node.key, 0)]
            node.parent = None
            self._queue(parent)
        return freed

    def nodes(self) -> Iterator[Node]:
        """Every node except the roots."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _descend(self, node: Node, at: int, tokens: np.ndarray, touch: bool) -> tuple[Node, int]:
        """Walk down from ``node``, where ``at`` tokens have matched; returns where the match ends and its length."""
        length = len(tokens) // self.page_size * self.page_size
        while at < length:
            child = node.children.get(self._child_key(tokens, at))
            if child is None:
                break
            same = self._common(child.key, tokens, at, length)
            at += same
            if same < len(child.key):
                if touch and self._touch_part:
                    child.last_access = self._tick
                    child.hits += 1
                node = self._split(child, same) if touch else child
                break
            if touch:
                child.last_access = self._tick
                child.hits += 1
            node = child
        return node, at

    def _queue(self, node: Node) -> None:
        if not node.queued and not node.locks and not node.children and node.parent is not None:
            node.queued = True
            self._entry += 1  # breaks ties by age, and keeps nodes from being compared
            heapq.heappush(self._heap, (*self._priority(node), self._entry, node))

    def _child_key(self, tokens: np.ndarray, at: int) -> int | bytes:
        return int(tokens[at]) if self.page_size == 1 else tokens[at : at + self.page_size].tobytes()

    def _common(self, key: np.ndarray, tokens: np.ndarray, at: int, length: int) -> int:
        """Length of the common run of ``key`` and ``tokens[at:length]``, in whole pages."""
        span = min(len(key), length - at)
        differs = (key[:span] != tokens[at : at + span]).nonzero()[0]
        same = int(differs[0]) if len(differs) else span
        return same // self.page_size * self.page_size

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node in two after ``at`` tokens and return the upper part, which inherits the locks and the past."""
        parent = node.parent
        assert parent is not None
        pages = at // self.page_size
        upper = Node(node.key[:at].copy(), node.pages[:pages].copy(), parent, node.created)
        upper.locks, upper.hits, upper.last_access = node.locks, node.hits, node.last_access
        parent.children[self._child_key(node.key, 0)] = upper
        node.key, node.pages, node.parent = node.key[at:].copy(), node.pages[pages:].copy(), upper
        upper.children[self._child_key(node.key, 0)] = node
        return upper
