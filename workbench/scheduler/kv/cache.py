"""Who owns which KV page: the free pool, the prefix cache, or a request."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.kv.pool import PagePool
from workbench.scheduler.kv.radix import Node, RadixTree
from workbench.scheduler.request import Req


class CacheManager:
    """The page pool with a prefix cache over it, or with none: then nothing ever matches and nothing is kept.

    A request's row starts with ``shared_pages`` pages that the tree owns and the request has locked; the pages after them
    are the request's own until they are inserted, freed as duplicates, or released.
    """

    def __init__(
        self, pages: int, page_size: int, table: TableManager, cache: str = "radix", evict: str = "lru"
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.table = table
        self.enabled = cache == "radix"
        self._evict = evict
        self.tree = RadixTree(page_size, evict)

    @property
    def available_pages(self) -> int:
        """Free pages and those that eviction could free."""
        return self.pool.free + self.tree.evictable_pages

    @property
    def used_tokens(self) -> int:
        """KV capacity that requests hold: neither free nor merely cached."""
        return (self.pool.total - self.pool.free - self.tree.evictable_pages) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> np.ndarray:
        """int32[count] pages, evicting what is needed. The caller has made sure that ``count <= available_pages``."""
        if count > self.pool.free:
            for pages in self.tree.evict(count - self.pool.free):
                self.pool.give(pages)
        return self.pool.take(count)

    def allocate_steps(self, counts: list[int]) -> np.ndarray:
        """int32[sum(counts)] pages: those that one :meth:`allocate` for each of ``counts`` would return, in a row."""
        taken: list[np.ndarray] = []
        totals = list(accumulate(counts, initial=0))
        first = 0
        while first < len(counts):
            # As many steps as there are free pages for.
            last = bisect_right(totals, totals[first] + self.pool.free) - 1
            if last == first:  # the first one has to evict
                taken.append(self.allocate(counts[first]))
                first += 1
                continue
            taken.append(self.pool.take(totals[last] - totals[first]))
            first = last
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def measure(self, req: Req) -> tuple[Node | None, int]:
        """The node and length a request would match now, without touching recency: for ordering the queue."""
        if not self.enabled:
            return None, 0
        return self.tree.match(req.tokens[: len(req.tokens) - 1], req.namespace, touch=False)

    def match(self, req: Req) -> tuple[Node | None, int]:
        """Longest cached prefix of a request, at most all but its last token: one must be computed to sample from."""
        if not self.enabled:
            return None, 0
        return self.tree.match(req.tokens[: len(req.tokens) - 1], req.namespace)

    def lock(self, node: Node | None) -> None:
        self.tree.lock(node)

    def unlock(self, node: Node | None) -> None:
        self.tree.unlock(node)

    def insert_computed(self, req: Req) -> None:
        """Share what a request has computed so far, while it goes on.

        Pages the tree already had are duplicates now: they are freed and the row is pointed at the tree's. A batch in
        flight may still read them; whoever is given them next writes in a later batch of the same stream.
        """
        if not self.enabled:
            return
        count = req.kv_len // self.page_size
        if count <= req.shared_pages:
            return
        # Its prompt, or a part of it, which need not be read back from the table.
        node, had = self._insert(req, req.tokens[: count * self.page_size], count, lock=True)
        if had > req.shared_pages:
            self.table.write_pages(req.row, req.shared_pages, self.tree.path_pages(node)[req.shared_pages : had])
        self.tree.unlock(req.node)
        req.node = node
        req.shared_pages = count

    def release(self, req: Req, valid_tokens: int, held_tokens: int, *, insert: bool) -> None:
        """End a request's hold on its pages. Its row is the caller's to give back.

        ``valid_tokens`` have KV worth keeping; pages cover ``held_tokens``, more when a batch ran after the stop.
        """
        held = self.pages_for(held_tokens)
        keep = req.shared_pages
        if insert and self.enabled:
            count = valid_tokens // self.page_size
            if count > keep:
                self._insert(req, self.table.tokens(req.row, count * self.page_size), count)
                keep = count
        if held > keep:
            self.pool.give(self.table.pages(req.row, keep, held))
        self.tree.unlock(req.node)
        req.node = None
        req.shared_pages = 0

    def flush(self) -> None:
        """Give back every page that no request has locked."""
        for pages in self.tree.evict(self.tree.evictable_pages):
            self.pool.give(pages)

    def _insert(self, req: Req, tokens: np.ndarray, count: int, *, lock: bool = False) -> tuple[Node, int]:
        """Insert the first ``count`` pages of a row, which hold ``tokens``, and free the duplicates among those it owned.
        Returns their last node, with ``lock`` locked, and how many pages the tree already had."""
        pages = self.table.pages(req.row, 0, count)
        if req.node is None:
            node, had = self.tree.insert(tokens, pages, req.namespace, lock=lock)
        else:
            depth = req.shared_pages * self.page_size
            node, had = self.tree.extend(req.node, depth, tokens, pages, lock=lock)
        if had > req.shared_pages:
            self.pool.give(pages[req.shared_pages : had])
        return node, had
