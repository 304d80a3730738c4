"""The prefix cache over a radix tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.kv.pool import PagePool
from workbench.scheduler.kv.prefix_cache import Match
from workbench.scheduler.kv.radix import RadixTree
from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req


class RadixCache:
    """:class:`PrefixCache` that shares any common beginning, page by page, within a namespace."""

    enabled = True
    names_at_once = False

    def __init__(
        self,
        pool: PagePool,
        table: TableManager,
        page_size: int,
        evict: str = "lru",
        *,
        touch_part: bool = True,
        touch_known: bool = False,
        split_at_prompt: bool = False,
    ) -> None:
        self.tree = self.counts = RadixTree(page_size, evict, touch_part=touch_part)
        self._pool = pool
        self._table = table
        self._page_size = page_size
        self._touch_known = touch_known
        self._split_at_prompt = split_at_prompt

    def touch(self, req: Req) -> int:
        return self.tree.match(req.tokens, req.namespace)[1]

    def measure(self, req: Req) -> Match:
        return Match(*self.tree.match(req.tokens[: len(req.tokens) - 1], req.namespace, touch=False))

    def match(self, req: Req) -> Match:
        return Match(*self.tree.match(req.tokens[: len(req.tokens) - 1], req.namespace))

    def path_pages(self, node: Node | None) -> np.ndarray:
        return self.tree.path_pages(node)

    def loose_pages(self, node: Node | None) -> int:
        loose = 0
        while node is not None:
            loose += 0 if node.locks else len(node.pages)
            node = node.parent
        return loose

    def lock(self, node: Node | None) -> None:
        self.tree.lock(node)

    def unlock(self, node: Node | None) -> None:
        self.tree.unlock(node)

    def insert(self, req: Req, tokens: np.ndarray | None = None) -> None:
        if tokens is None:
            # Its prompt, or a part of it, which need not be read back from the table. It may decode already, where prompts
            # are shared when their result comes.
            tokens = req.tokens[: req.kv_len]
        count = len(tokens) // self._page_size
        if count <= req.shared_pages:
            if count and self._touch_known:
                self._insert(req, tokens[: count * self._page_size], count)
            return
        node, had = self._insert(req, tokens[: count * self._page_size], count, lock=True)
        if had > req.shared_pages:
            self._table.write_pages(req.row, req.shared_pages, self.tree.path_pages(node)[req.shared_pages : had])
        self.tree.unlock(req.node)
        req.node = node
        req.shared_pages = count

    def release(self, req: Req, valid_tokens: int, held_tokens: int, *, insert: bool) -> None:
        held = -(-held_tokens // self._page_size)
        keep = req.shared_pages
        if insert:
            count = valid_tokens // self._page_size
            if count > keep or (count and self._touch_known):
                self._insert(req, self._table.tokens(req.row, count * self._page_size), count)
                keep = count
        if held > keep:
            self._pool.give(self._table.pages(req.row, keep, held))
        self.tree.unlock(req.node)
        req.node = None
        req.shared_pages = 0

    def give_unused(self, pages: np.ndarray) -> None:
        self._pool.give(pages)

    def started(self, req: Req) -> None: ...

    def fill(self, req: Req, tokens: int) -> None: ...

    def fill_decodes(self, reqs: list[Req], rows: np.ndarray, tokens: np.ndarray) -> None: ...

    def unfill(self, req: Req, tokens: int) -> None: ...

    def evict(self, count: int) -> None:
        for pages in self.tree.evict(count):
            self._pool.give(pages)

    def nodes(self) -> Iterator[Node]:
        return self.tree.nodes()

    def check(self, holders: Iterable[tuple[Req, int]]) -> list[np.ndarray]:
        owned = [node.pages for node in self.tree.nodes()]
        unlocked = sum(len(node.pages) for node in self.tree.nodes() if not node.locks)
        assert unlocked == self.tree.evictable_pages, "evictable pages are miscounted"
        return [*owned, *(self._table.pages(req.row, req.shared_pages, -(-n // self._page_size)) for req, n in holders)]

    def _insert(self, req: Req, tokens: np.ndarray, count: int, *, lock: bool = False) -> tuple[Node, int]:
        """Insert the first ``count`` pages of a row, which hold ``tokens``, and free the duplicates among those it owned.
        Returns their last node, with ``lock`` locked, and how many pages the tree already had."""
        pages = self._table.pages(req.row, 0, count)
        if req.node is None:
            node, had = self.tree.insert(tokens, pages, req.namespace, lock=lock)
        else:
            depth = req.shared_pages * self._page_size
            node, had = self.tree.extend(req.node, depth, tokens, pages, lock=lock)
        if had > req.shared_pages:
            self._pool.give(pages[req.shared_pages : had])
        if self._split_at_prompt and (prompt := req.input_len // self._page_size) < count:
            self.tree.match(tokens[: prompt * self._page_size], req.namespace)
        return node, had
