"""The prefix cache that is switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.kv.pool import PagePool
from workbench.scheduler.kv.prefix_cache import Match
from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req

_NOTHING = Match(None, 0)


class NoCache:
    """:class:`PrefixCache` in which nothing ever matches and nothing is kept."""

    enabled = False
    names_at_once = False
    evictable_pages = 0
    protected_pages = 0

    @property
    def counts(self) -> NoCache:
        return self

    def __init__(self, pool: PagePool, table: TableManager, page_size: int) -> None:
        self._pool = pool
        self._table = table
        self._page_size = page_size

    def measure(self, req: Req) -> Match:
        return _NOTHING

    def match(self, req: Req) -> Match:
        return _NOTHING

    def touch(self, req: Req) -> int:
        return 0

    def path_pages(self, node: Node | None) -> np.ndarray:
        return np.empty(0, np.int32)

    def loose_pages(self, node: Node | None) -> int:
        return 0

    def lock(self, node: Node | None) -> None: ...

    def unlock(self, node: Node | None) -> None: ...

    def insert(self, req: Req, tokens: np.ndarray | None = None) -> None: ...

    def release(self, req: Req, valid_tokens: int, held_tokens: int, *, insert: bool) -> None:
        if held_tokens:
            self._pool.give(self._table.pages(req.row, 0, -(-held_tokens // self._page_size)))

    def give_unused(self, pages: np.ndarray) -> None:
        self._pool.give(pages)

    def started(self, req: Req) -> None: ...

    def fill(self, req: Req, tokens: int) -> None: ...

    def fill_decodes(self, reqs: list[Req], rows: np.ndarray, tokens: np.ndarray) -> None: ...

    def unfill(self, req: Req, tokens: int) -> None: ...

    def evict(self, count: int) -> None: ...

    def nodes(self) -> Iterator[Node]:
        return iter(())

    def check(self, holders: Iterable[tuple[Req, int]]) -> list[np.ndarray]:
        return [self._table.pages(req.row, 0, -(-tokens // self._page_size)) for req, tokens in holders]
