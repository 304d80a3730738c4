"""Rows of the page table and the token pool: one row a request that holds KV."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.batch import PageWrite


class TableManager:
    """Owns ``pages`` (which KV page holds a request's n-th page) and ``tokens`` (its prompt and output).

    Both are allocated zeroed and untouched memory costs nothing, so the width can be the longest context.
    """

    def __init__(self, rows: int, max_context: int, page_size: int) -> None:
        self.rows = rows
        self.width = max_context + 1
        self.page_width = -(-self.width // page_size)
        self.tokens = np.zeros((rows, self.width), np.int32)
        self.pages = np.zeros((rows, self.page_width), np.int32)
        # Flat views of the same memory: one index array instead of two halves the cost of a scatter.
        self.tokens_flat = self.tokens.reshape(-1)
        self.pages_flat = self.pages.reshape(-1)
        self.free = list(range(rows - 1, -1, -1))
        """Rows that nobody has."""
        self._writes: list[PageWrite] = []

    @property
    def free_rows(self) -> int:
        return len(self.free)

    def take_row(self) -> int:
        return self.free.pop()

    def give_row(self, row: int) -> None:
        self.free.append(row)

    def write_pages(self, row: int, first_page: int, pages: np.ndarray) -> None:
        """Set entries of a row and note the change for the backend's own copy of the table."""
        self.pages[row, first_page : first_page + len(pages)] = pages
        self._writes.append(PageWrite(row, first_page, pages))

    def take_writes(self) -> tuple[PageWrite, ...]:
        """The changes since the last call, in order."""
        if not self._writes:
            return ()
        writes = tuple(self._writes)
        self._writes.clear()
        return writes
