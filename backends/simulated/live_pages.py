"""KV pages of a modelled instance in real time: what is sent takes the time of its link, and says which page it was."""

from __future__ import annotations

import time

import numpy as np

PAGE_BYTES = 8
"""The number of the sender's page, int64: enough to see on the other side that what came is what was sent."""


class ModelledPages:
    """Pages with nothing in them but where they came from. A read takes as long as the link that carries it would."""

    share = (0, 1, 0, 1, PAGE_BYTES)
    """One layer, one head."""

    def __init__(self, pages: int, page_s: float, latency_s: float) -> None:
        """``page_s``: of a page on the link, in real seconds; ``latency_s``: of what is sent at once."""
        self.pages = pages
        self.held = np.full(pages, -1, np.int64)
        """By page, the sender's page that came last; -1: none."""
        self._page_s, self._latency_s = page_s, latency_s

    def read(self, rank: int, pages: np.ndarray) -> np.ndarray:
        """Return uint8[1, 1, k, 8] once the link has carried pages int32[k]."""
        time.sleep(len(pages) * self._page_s + self._latency_s)
        return pages.astype(np.int64).view(np.uint8).reshape(1, 1, len(pages), PAGE_BYTES)

    def write(self, rank: int, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        """Note where pages int32[k] came from."""
        self.held[pages] = np.ascontiguousarray(block).reshape(-1).view(np.int64)
