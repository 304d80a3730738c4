"""Decode steps as CUDA graphs: one launch instead of hundreds. Not yet run on a GPU."""

from __future__ import annotations

import bisect
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.torch.staging import to_device
from workbench.scheduler.batch import ModelWorkerBatch

Step = Callable[[Tensor, Tensor, Tensor], None]
"""Computes one decode step: rows int64[n] and seq_lens int64[n] in, logits [n, vocab] out, all on the device."""


@contextmanager
def without_collection() -> Iterator[None]:
    """Let nothing be collected meanwhile: what is freed during a capture, an old graph, say, would break it."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class DecodeGraphs:
    """Captured decode steps of several batch sizes; a batch runs in the smallest that holds it, padded.

    Padding rows are the spare row, whose pages are the spare page, at length 1. A graph reads which rows run and how long
    they are from two fixed buffers; everything else (last tokens, pages, slots) it looks up itself. It writes logits to one
    more fixed buffer, which all sizes share: nothing that a graph's memory pool holds outlives a replay, so that the sizes
    can share the pool, too.

    A replay may be launched while the one before it still runs, and before its samples are taken: the copies into the
    buffers, the replay and the sampling that reads the logits are all in one stream, in the order of their launch.
    """

    def __init__(
        self, step: Step, spare_row: int, vocab: int, dtype: torch.dtype, device: torch.device, sizes: list[int]
    ) -> None:
        """Capture ``step``, whose logits are of ``dtype``, from the largest size to the smallest: what the first one needs
        of the pool is enough for all."""
        began = time.perf_counter()
        torch.cuda.synchronize(device)
        free_before, _ = torch.cuda.mem_get_info(device)
        self._step, self._spare_row, self._device = step, spare_row, device
        self.sizes = sorted(set(sizes))
        """Batch sizes, ascending."""
        self.largest = self.sizes[-1]
        self._rows = torch.full((self.largest,), spare_row, dtype=torch.int64, device=device)
        self._seq_lens = torch.ones(self.largest, dtype=torch.int64, device=device)
        self._logits = torch.empty((self.largest, vocab), dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        with without_collection():
            for size in reversed(self.sizes):
                self._graphs[size] = self._capture(size, pool, stream)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.bytes = max(free_before - torch.cuda.mem_get_info(device)[0], 0)
        """Device memory that all of it took, as the driver sees it."""
        self.seconds = time.perf_counter() - began
        """What capturing took, kernels' compilation included."""

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            # Compiles the kernels for this size and warms the libraries up: neither is allowed in a capture.
            self._run(size)
            graph = torch.cuda.CUDAGraph()
            # Threads other than this one may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._run(size)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph

    def _run(self, size: int) -> None:
        self._step(self._rows[:size], self._seq_lens[:size], self._logits[:size])

    def replay(self, batch: ModelWorkerBatch, begin: Callable[[], object]) -> tuple[Tensor, Tensor, Tensor]:
        """(rows int64[n], seq_lens int64[n], logits [n, vocab]) of a decode batch, on the device.

        The logits are valid until the next replay. ``begin`` is called when the inputs are on their way.
        """
        count = batch.decode_tokens
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        staged = np.empty((2, size), np.int64)
        staged[0, :count], staged[0, count:] = batch.rows, self._spare_row
        staged[1, :count], staged[1, count:] = batch.seq_lens, 1
        packed = to_device(staged, self._device)
        self._rows[:size].copy_(packed[0])
        self._seq_lens[:size].copy_(packed[1])
        begin()
        self._graphs[size].replay()
        return packed[0, :count], packed[1, :count], self._logits[:count]
