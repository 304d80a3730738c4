"""Free lists: KV pages and table rows."""

from __future__ import annotations

import numpy as np


class PagePool:
    """The free pages of the KV pool, as a stack in an array: taking and giving back are slice copies."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        # Reversed, so that the first pages taken are 0, 1, 2, ...: easy to read in a test or a dump.
        self._stack = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self.free = pages

    def take(self, count: int) -> np.ndarray:
        """int32[count] page ids, the same as in several calls for less. The caller has made sure that ``count <= free``."""
        top = self.free
        if count > top:
            raise AssertionError(f"took {count} of {top} free pages")
        self.free = rest = top - count
        return self._stack[rest:top][::-1].copy()

    def give(self, pages: np.ndarray) -> None:
        """Return pages to the pool."""
        top = self.free + len(pages)
        if top > self.total:
            raise AssertionError(f"{len(pages)} pages returned to a pool of {self.total} with {self.free} free")
        self._stack[self.free : top] = pages
        self.free = top

    def free_pages(self) -> np.ndarray:
        """int32[free], a copy, for checks."""
        return self._stack[: self.free].copy()
