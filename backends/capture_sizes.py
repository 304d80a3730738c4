"""Batch sizes for which decode graphs are captured: what the real runner captures, a model of it assumes."""

from __future__ import annotations


def default_capture_sizes(max_batch: int = 256) -> list[int]:
    """1, 2, 4 and multiples of 8, up to the first that holds ``max_batch``."""
    return [size for size in [1, 2, 4, *range(8, max_batch + 8, 8)] if size < max_batch + 8]
