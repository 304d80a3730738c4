"""Pages of a rank's KV pool as bytes: to other instances and from them, to the host's memory and back.

A page is uint8 by layer and head: [layers, heads, pages, page_bytes], of which the last are keys and values of its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from backends.torch.forward_batch import KVPool
from workbench.scheduler.batch import KVCopy


class KVShare(NamedTuple):
    """The part of a model's KV that a rank holds: layers and KV heads, and the bytes of a page of one head in one layer."""

    first_layer: int
    end_layer: int
    first_head: int
    end_head: int
    page_bytes: int


class KVPages:
    """The pages of one rank. :meth:`read` and :meth:`write` may be called from any one thread while batches run: of pages
    that no batch in flight writes, and of pages that none reads. On CUDA they use a stream of their own and pinned memory;
    that has not run on a GPU yet."""

    def __init__(self, pool: KVPool, page_size: int) -> None:
        slots, self.heads, self.head_dim = pool.keys[0].shape
        self.layers, self.page_size = len(pool.keys), page_size
        self._shape = (slots // page_size, page_size, self.heads, self.head_dim)
        self._keys = [keys.view(self._shape) for keys in pool.keys]
        self._values = [values.view(self._shape) for values in pool.values]
        self._dtype, self._device = pool.keys[0].dtype, pool.keys[0].device
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None

    @property
    def page_bytes(self) -> int:
        """Of a page of one head in one layer."""
        return 2 * self.page_size * self.head_dim * self._dtype.itemsize

    def read(self, pages: np.ndarray) -> np.ndarray:
        """Return pages int32[k]: uint8[layers, heads, k, page_bytes]. Blocks until they are there."""
        with torch.no_grad(), self._aside():
            found = self._gather(self._index(pages), self._cuda)
        self._wait()
        return found.view(torch.uint8).numpy().reshape(self.layers, self.heads, len(pages), self.page_bytes)

    def write(self, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        """Write layers and heads of this rank of pages int32[k], from uint8[layers, heads, k, page_bytes]. Blocks until what
        is launched afterwards reads them."""
        data = torch.from_numpy(np.array(block)).view(self._dtype)  # a copy: what is given is somebody's buffer
        if self._cuda:
            data = data.pin_memory()
        with torch.no_grad(), self._aside():
            self._scatter(self._index(pages), data, layers, heads)
        self._wait()

    def save(self, pages: np.ndarray) -> Tensor:
        """Return a copy of pages in the host's memory, in the order of the batches: for :meth:`load`."""
        return self._gather(self._index(pages), self._cuda)

    def load(self, pages: np.ndarray, saved: Tensor, first: int) -> None:
        """Write pages from what was saved, from its page ``first`` on, in the order of the batches."""
        self._scatter(self._index(pages), saved[:, :, first : first + len(pages)], slice(None), slice(None))

    def _index(self, pages: np.ndarray) -> Tensor:
        index = torch.from_numpy(pages.astype(np.int64))
        return index.pin_memory().to(self._device, non_blocking=True) if self._cuda else index

    def _gather(self, index: Tensor, pinned: bool) -> Tensor:
        """[layers, heads, k, 2, page_size, head_dim] on the host."""
        shape = (self.layers, self.heads, len(index), 2, self.page_size, self.head_dim)
        found = torch.empty(shape, dtype=self._dtype, pin_memory=pinned)
        for layer in range(self.layers):
            halves = [pool[layer][index].permute(2, 0, 1, 3) for pool in (self._keys, self._values)]
            if pinned:
                # In one piece: a copy from a GPU waits for nothing only where both sides are in order.
                found[layer].copy_(torch.stack(halves, 2), non_blocking=True)
            else:
                for which, half in enumerate(halves):
                    found[layer, :, :, which] = half
        return found

    def _scatter(self, index: Tensor, data: Tensor, layers: slice, heads: slice) -> None:
        shape = (len(index), 2, self.page_size, self.head_dim)
        for at, layer in enumerate(range(self.layers)[layers]):
            part = data[at].reshape(-1, *shape).to(self._device, non_blocking=self._cuda)  # [heads, k, 2, page, dim]
            for which, pool in enumerate((self._keys, self._values)):
                pool[layer][index, :, heads] = part[:, :, which].permute(1, 2, 0, 3)

    def _aside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class SavedKV:
    """KV of retracted requests in the host's memory, by their ids."""

    DIRECTIONS = frozenset(("save", "load", "forget"))
    """Of the copies that :meth:`make` makes."""

    def __init__(self, pages: KVPages) -> None:
        self._pages = pages
        self._saved: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._saved)

    def make(self, copies: Iterable[KVCopy]) -> None:
        """Make the copies that a batch brings before it runs, in order. Raises NotImplementedError for others."""
        for copy in copies:
            if copy.direction == "save":
                self._saved[copy.name] = self._pages.save(copy.pages)
            elif copy.direction == "load":
                self._pages.load(copy.pages, self._saved.pop(copy.name), copy.first_page)
            elif copy.direction == "forget":
                self._saved.pop(copy.name, None)
            else:
                raise NotImplementedError(f"kv_copies: the torch backend does not {copy.direction} pages in a batch")


SAMPLE = 16
"""Values of a tensor that stand for it: its first ones, which the first rank of a stage holds however the model is split."""


def weights_sample(layers: Iterable[nn.Module]) -> list[str]:
    """Return a hash for each layer, of a few values of every tensor in it: equal for the same weights, hardly for others."""
    found = []
    for layer in layers:
        digest = hashlib.sha256()
        for name, parameter in sorted(layer.named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().reshape(-1)[:SAMPLE].float().cpu().numpy().tobytes())
        found.append(digest.hexdigest())
    return found
