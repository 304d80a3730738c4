"""KV memory: who owns which page, the free pool, the prefix cache, or a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.block_cache import BlockCache
from workbench.scheduler.kv.no_cache import NoCache
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.kv.pool import PagePool
from workbench.scheduler.kv.prefix_cache import PrefixCache
from workbench.scheduler.kv.radix_cache import RadixCache
from workbench.scheduler.request import Req


class KVMemory:
    """The page pool, the table of who has which page, and the prefix cache over both."""

    def __init__(self, config: SchedulerConfig) -> None:
        size = config.page_size
        self.page_size = size
        self._evicts_all = config.evict_amount == "all"
        self.pool = PagePool(config.pages)
        self.table = TableManager(config.rows, config.max_context, size)
        self.cache: PrefixCache
        if config.cache == "radix":
            self.cache = RadixCache(
                self.pool,
                self.table,
                size,
                config.evict,
                touch_part=config.touch_part,
                touch_known=config.touch_known,
                split_at_prompt=config.split_at_prompt,
            )
        elif config.cache == "blocks":
            self.cache = BlockCache(self.pool, self.table, size, blanks_queue=config.blank_pages == "queue")
        else:
            self.cache = NoCache(self.pool, self.table, size)
        self._cached = self.cache.counts

    @property
    def available_pages(self) -> int:
        """Free pages and those that eviction could free."""
        return self.pool.free + self._cached.evictable_pages

    @property
    def used_tokens(self) -> int:
        """KV capacity that requests hold: neither free nor merely cached."""
        return (self.pool.total - self.pool.free - self._cached.evictable_pages) * self.page_size

    @property
    def cached_tokens(self) -> int:
        """KV capacity of what the prefix cache keeps for nobody in particular."""
        return self._cached.evictable_pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def free_up(self, count: int) -> None:
        """Evict until so many pages are free, or nothing more can be evicted."""
        if count > self.pool.free:
            self.cache.evict(count if self._evicts_all else count - self.pool.free)

    def allocate(self, count: int, steps: Sequence[int] = ()) -> np.ndarray:
        """int32[count] pages, evicting what is needed; the caller has made sure that ``count <= available_pages``. With
        ``steps``, how many each of several decode steps takes, each of them evicts what it needs itself."""
        if count <= self.pool.free:
            return self.pool.take(count)
        if steps:
            return self._take_evicting(count, steps, 0)
        self.free_up(count)
        return self.pool.take(count)

    def allocate_ahead(self, count: int, steps: Sequence[int], least: int) -> np.ndarray:
        """:meth:`allocate` where each step evicts until ``least`` pages are free."""
        if count + least <= self.pool.free:
            return self.pool.take(count)
        return self._take_evicting(count, steps, least)

    def _take_evicting(self, count: int, steps: Sequence[int], least: int) -> np.ndarray:
        pool = self.pool
        taken = []
        ready = 0
        for each in steps or (count,):
            most = max(each, least)
            if ready + most > pool.free:
                taken.append(pool.take(ready))
                ready = 0
                for wanted in (each, least) if self._evicts_all else (most,):
                    self.free_up(wanted)
            ready += each
        taken.append(pool.take(ready))
        return np.concatenate(taken)

    def flush(self) -> None:
        """Free every page that no request has locked."""
        self.cache.evict(self._cached.evictable_pages)

    def check_rest(self) -> None:
        """Assert that nobody holds anything."""
        assert self.available_pages == self.pool.total, "KV pages are missing at rest"
        assert self.table.free_rows == self.table.rows, "table rows are missing at rest"

    def check(self, holders: Iterable[tuple[Req, int]]) -> None:
        """Assert that every page has exactly one owner, given the requests that have a row and how many tokens their pages
        cover. It walks everything."""
        pages = np.concatenate([self.pool.free_pages(), *self.cache.check(list(holders))])
        assert len(pages) == self.pool.total, f"{len(pages)} of {self.pool.total} pages have an owner"
        assert len(np.unique(pages)) == len(pages), "a page has two owners"
