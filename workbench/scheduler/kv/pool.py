"""Free lists: KV pages and table rows."""

from __future__ import annotations

import numpy as np


class PagePool:
    """The free pages of the KV pool, as a stack in an array: taking and giving back are slice copies."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        # Its top is in front of it, so that what is taken is one slice.
        self._stack = np.arange(pages, dtype=np.int32)
        self.free = pages

    def take(self, count: int) -> np.ndarray:
        """int32[count] page ids, the same as in several calls for less. The caller has made sure that ``count <= free``."""
        if count > self.free:
            raise AssertionError(f"took {count} of {self.free} free pages")
        top = self.total - self.free
        self.free -= count
        return self._stack[top : top + count].copy()

    def give(self, pages: np.ndarray) -> None:
        """Return pages to the pool."""
        free = self.free + len(pages)
        if free > self.total:
            raise AssertionError(f"{len(pages)} pages returned to a pool of {self.total} with {self.free} free")
        # The last one given is the first one taken.
        self._stack[self.total - free : self.total - self.free] = pages[::-1]
        self.free = free

    def free_pages(self) -> np.ndarray:
        """int32[free], a copy, for checks."""
        return self._stack[self.total - self.free :].copy()
