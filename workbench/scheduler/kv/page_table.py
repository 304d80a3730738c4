"""Rows of the page table and the token pool: one row a request that holds KV."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.batch import PageWrite


class TableManager:
    """Table of the KV pages of requests, and of their prompts and outputs.

    Both tables are allocated zeroed and untouched memory costs nothing, so the width can be the longest context.
    """

    def __init__(self, rows: int, max_context: int, page_size: int) -> None:
        self.rows = rows
        self.width = max_context + 1
        self.page_width = -(-self.width // page_size)
        self._tokens = _Table(rows, self.width)
        self._pages = _Table(rows, self.page_width)
        self.free = list(range(rows - 1, -1, -1))
        """Rows that nobody has."""
        self.aside = 0
        """Rows of requests that neither decode nor are in a prefill: their KV is on its way between instances."""
        self.known = np.zeros(rows, np.int64)
        """Tokens of each row that have been given; kept up where steps bring runs of tokens, and only for decodes."""
        self._writes: list[PageWrite] = []

    @property
    def free_rows(self) -> int:
        return len(self.free)

    def take_row(self) -> int:
        return self.free.pop()

    def give_row(self, row: int) -> None:
        # What waits for the row must not overwrite what its next owner writes.
        self._tokens.settled()
        self._pages.settled()
        self.free.append(row)

    def tokens(self, row: int, count: int) -> np.ndarray:
        """int32[count], a view of a row's first tokens, to be read before anything else is written."""
        return self._tokens.settled()[row, :count]

    def pages(self, row: int, first: int, end: int) -> np.ndarray:
        """int32[end - first], a view of a row's pages, to be read before anything else is written."""
        return self._pages.settled()[row, first:end]

    def gather_tokens(self, rows: np.ndarray, first: np.ndarray, count: int) -> np.ndarray:
        """int32[n, count], tokens of several rows, each from its ``first``."""
        at = rows * self.width + first
        tokens: np.ndarray = self._tokens.settled().reshape(-1)[at[:, None] + np.arange(count)]
        return tokens

    def gather_pages(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """int32[n], a page of each of several rows."""
        pages: np.ndarray = self._pages.settled().reshape(-1)[rows * self.page_width + places]
        return pages

    def write_tokens(self, row: int, tokens: np.ndarray) -> None:
        """Set a row's first tokens. No write to these places may be waiting: rows are given back settled."""
        self._tokens.values[row, : len(tokens)] = tokens

    def write_pages(self, row: int, first_page: int, pages: np.ndarray) -> None:
        """Set entries of a row, to which no write may be waiting, and note it for the backend's own copy of the table."""
        self._pages.values[row, first_page : first_page + len(pages)] = pages
        self._writes.append(PageWrite(row, first_page, pages))

    def add_tokens(self, at: np.ndarray, tokens: np.ndarray) -> None:
        """Set one token each of several rows: int64[n] indices ``row * width + position``. Both arrays are kept for a while
        and must not change."""
        self._tokens.scatter(at, tokens)

    def add_pages(self, at: np.ndarray, pages: np.ndarray) -> None:
        """Set one page each of several rows: int64[n] indices ``row * page_width + page``, as for :meth:`add_tokens`. The
        backend learns of it from the batch."""
        self._pages.scatter(at, pages)

    def take_writes(self) -> tuple[PageWrite, ...]:
        """The changes since the last call, in order."""
        if not self._writes:
            return ()
        writes = tuple(self._writes)
        self._writes.clear()
        return writes


class _Table:
    """int32[rows, width] with scattered writes that wait until somebody reads: every step writes a little to every row, and
    one large write costs a fraction of many small ones."""

    WAITING = 256
    FEW = 5
    """One large write costs as much as so many small ones."""

    def __init__(self, rows: int, width: int) -> None:
        self.values = np.zeros((rows, width), np.int32)
        """Without what still waits."""
        # A flat view: one index array instead of two halves the cost of a scatter.
        self._flat = self.values.reshape(-1)
        self._at: list[np.ndarray] = []
        self._new: list[np.ndarray] = []

    def scatter(self, at: np.ndarray, values: np.ndarray) -> None:
        self._at.append(at)
        self._new.append(values)
        if len(self._at) >= self.WAITING:
            self.settled()

    def settled(self) -> np.ndarray:
        """The table with everything written."""
        if self._at:
            if len(self._at) < self.FEW:
                for at, values in zip(self._at, self._new, strict=True):
                    self._flat[at] = values
            else:
                self._flat[np.concatenate(self._at)] = np.concatenate(self._new)
            self._at.clear()
            self._new.clear()
        return self.values
