"""KV pages of a rank: to other instances as bytes, and to the host's memory and back."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from backends.torch.backend import TorchBackend
from backends.torch.forward_batch import KVPool
from backends.torch.kv_pages import KVPages, SavedKV
from tests.cost.profiles import batch
from workbench.scheduler.batch import KVCopy

LAYERS, PAGES, SIZE, HEADS, DIM = 3, 10, 4, 4, 8


def filled(heads: int = HEADS, dtype: torch.dtype = torch.bfloat16) -> tuple[KVPool, KVPages]:
    """A pool with something else in every place, and its pages."""
    pool = KVPool.allocate(LAYERS, PAGES * SIZE, heads, DIM, dtype, "cpu")
    generator = torch.Generator().manual_seed(heads)
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_(generator=generator)
    return pool, KVPages(pool, SIZE)


def pages_of(pool: KVPool, pages: list[int], heads: slice = slice(None)) -> list[torch.Tensor]:
    shape = (PAGES, SIZE, -1, DIM)
    return [tensor.view(shape)[pages][:, :, heads].clone() for tensor in (*pool.keys, *pool.values)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_pages_are_read_and_written_by_layer_and_head() -> None:
    source, read = filled()
    block = read.read(np.array([7, 2], np.int32))
    assert block.shape == (LAYERS, HEADS, 2, read.page_bytes)
    whole, written = filled(dtype=torch.bfloat16)
    before = pages_of(whole, [0, 1, 3, 4])
    written.write(slice(None), slice(None), np.array([5, 9], np.int32), block)
    assert same(pages_of(whole, [5, 9]), pages_of(source, [7, 2]))
    assert same(pages_of(whole, [0, 1, 3, 4]), before), "another page was written"
    half, written = filled(2)
    written.write(slice(None), slice(0, 2), np.array([1, 0], np.int32), block[:, 2:])
    assert same(pages_of(half, [1, 0]), pages_of(source, [7, 2], slice(2, 4)))
    written.write(slice(1, 2), slice(1, 2), np.array([3, 4], np.int32), block[1:2, :1])
    assert torch.equal(half.keys[1].view(PAGES, SIZE, 2, DIM)[[3, 4], :, 1], pages_of(source, [7, 2])[1][:, :, 0])


def test_what_is_saved_comes_back_from_any_of_its_pages_on_and_is_kept_no_longer() -> None:
    pool, pages = filled()
    saved = SavedKV(pages)
    wanted = pages_of(pool, [1, 2, 3])
    saved.make([KVCopy("save", np.array([1, 2, 3], np.int32), "r"), KVCopy("save", np.array([4], np.int32), "other")])
    for tensor in (*pool.keys, *pool.values):
        tensor.zero_()
    saved.make([KVCopy("load", np.array([8, 6], np.int32), "r", 1), KVCopy("forget", np.empty(0, np.int32), "other")])
    assert same(pages_of(pool, [8, 6]), [one[1:] for one in wanted])
    assert len(saved) == 0
    with pytest.raises(NotImplementedError, match="does not send pages in a batch"):
        saved.make([KVCopy("send", np.array([1], np.int32))])


def test_whoever_writes_beside_batches_waits_for_those_launched_until_then() -> None:
    facts = {"kv_tokens": 64, "max_context": 64, "eos_token_ids": (), "vocab": 8, "dtype": "fp32", "kv_dtype": "fp32"}
    workers: Any = SimpleNamespace(**facts, submit=lambda batch: lambda: None, close=lambda: None)
    backend = TorchBackend(workers, lambda row: None)
    backend.landed()()
    first, wait_for_first = backend.launch(batch([5])), backend.landed()
    second, wait_for_both = backend.launch(batch([6])), backend.landed()
    passed: list[str] = []
    waits = [("first", wait_for_first), ("both", wait_for_both)]
    threads = [threading.Thread(target=lambda name, wait: (wait(), passed.append(name)), args=pair) for pair in waits]
    for thread in threads:
        thread.start()
    assert not passed
    backend.done(first)()
    threads[0].join()
    assert passed == ["first"]
    backend.done(second)()
    threads[1].join()
    assert passed == ["first", "both"]
    backend.launch(batch([7]))
    never = backend.landed()
    backend.close()
    never()
