"""The KV of an instance, as whoever carries it to another one sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Box(NamedTuple):
    """Layers and KV heads of a model: ``[first, end)`` of either."""

    first_layer: int
    end_layer: int
    first_head: int
    end_head: int

    @property
    def layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def heads(self) -> int:
        return self.end_head - self.first_head

    def overlap(self, other: Box) -> Box | None:
        """Return what both hold; None where that is nothing."""
        box = Box(
            max(self.first_layer, other.first_layer),
            min(self.end_layer, other.end_layer),
            max(self.first_head, other.first_head),
            min(self.end_head, other.end_head),
        )
        return box if box.layers > 0 and box.heads > 0 else None

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Return where it lies in a block of ``outer``: along layers, along heads."""
        return (
            slice(self.first_layer - outer.first_layer, self.end_layer - outer.first_layer),
            slice(self.first_head - outer.first_head, self.end_head - outer.first_head),
        )


@dataclass(frozen=True)
class KVShape:
    """Shape of the KV of a whole model, however an instance splits it."""

    layers: int
    heads: int
    page_bytes: int
    """Of a page of one head in one layer, keys and values."""

    @property
    def whole(self) -> Box:
        return Box(0, self.layers, 0, self.heads)

    def block(self, box: Box, pages: int) -> tuple[int, int, int, int]:
        """Return the shape of so many pages of a box, as uint8: by layer, head, page."""
        return box.layers, box.heads, pages, self.page_bytes

    def block_bytes(self, box: Box, pages: int) -> int:
        return box.layers * box.heads * pages * self.page_bytes


Landed = Callable[[], object]
"""Blocks until certain batches have run."""


class KVMemory(Protocol):
    """Pages of an instance. Both methods block, and may be called from any thread while batches run."""

    shape: KVShape
    pages: int
    """How many there are."""
    sources: Sequence[Box]
    """What is read at a time: the share of each rank, and every layer and head in one of them."""

    def read(self, box: Box, pages: np.ndarray) -> np.ndarray:
        """Return a copy of pages int32[k] of one of :attr:`sources`, as uint8 ``shape.block(box, k)``."""
        ...

    def write(self, box: Box, pages: np.ndarray, block: np.ndarray) -> None:
        """Write pages int32[k] of any box, from uint8 ``shape.block(box, k)``, wherever ranks hold parts of it. What is
        launched afterwards reads what was written."""
        ...

    def landed(self) -> Landed:
        """Return a wait for all batches that have been launched by now. Asked by who launches them; waited for by others."""
        ...


Read = Callable[[int, np.ndarray], np.ndarray]
Write = Callable[[int, slice, slice, np.ndarray, np.ndarray], None]


class RanksKV:
    """:class:`KVMemory` of an instance whose ranks each hold a share. Heads are split and merged by what shares have in
    common with what is sent; where several hold the same heads, one is read and all are written."""

    def __init__(
        self,
        shares: Sequence[tuple[int, int, int, int, int]],
        pages: int,
        read: Read,
        write: Write,
        landed: Callable[[], Landed] = lambda: _nothing_to_wait_for,
    ) -> None:
        """``shares``: of each rank its layers and heads, and the bytes of a page; ``read`` and ``write`` do it on a rank.
        Without ``landed``, no batch touches what is in pages."""
        self._shares = [Box(*share[:4]) for share in shares]
        self.shape = KVShape(
            max(box.end_layer for box in self._shares), max(box.end_head for box in self._shares), shares[0][4]
        )
        self.pages = pages
        self.sources: Sequence[Box] = list(dict.fromkeys(self._shares))
        self._read, self._write = read, write
        self.landed = landed

    def read(self, box: Box, pages: np.ndarray) -> np.ndarray:
        return self._read(self._shares.index(box), pages)

    def write(self, box: Box, pages: np.ndarray, block: np.ndarray) -> None:
        for rank, share in enumerate(self._shares):
            common = share.overlap(box)
            if common is not None:
                self._write(rank, *common.within(share), pages, block[common.within(box)])


def _nothing_to_wait_for() -> None:
    """Return at once."""
