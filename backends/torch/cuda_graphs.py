"""Decode steps as CUDA graphs: one launch instead of hundreds. Not yet run on a GPU."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backends.torch.forward_batch import ForwardBatch
from workbench.scheduler.batch import ModelWorkerBatch

if TYPE_CHECKING:
    from backends.torch.runner import ModelRunner


class DecodeGraphs:
    """Captured decode steps of several batch sizes; a batch runs in the smallest that holds it, padded.

    Padding rows are the runner's spare row, whose pages are the spare page, at length 1. A graph reads which rows run and
    how long they are from two fixed buffers; everything else (last tokens, pages, slots) it looks up itself.
    """

    def __init__(self, runner: ModelRunner, sizes: list[int]) -> None:
        """Captures from the largest to the smallest, so that all share one memory pool."""
        self._runner = runner
        self._sizes = sorted(sizes)
        self.largest = self._sizes[-1]
        device = runner.device
        self._rows = torch.full((self.largest,), runner.rows, dtype=torch.int64, device=device)
        self._seq_lens = torch.ones(self.largest, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = None
        stream = torch.cuda.Stream(device)
        for size in reversed(self._sizes):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.inference_mode(), torch.cuda.stream(stream):
                self._step(size)  # compiles the kernels and warms the libraries up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    logits = self._step(size)
            torch.cuda.current_stream(device).wait_stream(stream)
            pool = graph.pool()
            self._graphs[size] = graph, logits

    def _step(self, size: int) -> Tensor:
        runner = self._runner
        rows, seq_lens = self._rows[:size], self._seq_lens[:size]
        positions = seq_lens - 1
        batch = ForwardBatch(
            runner.last_token[rows], positions, runner.slots(rows, positions), rows, seq_lens.int(), runner.page_table,
            runner.page_size,
        )  # fmt: skip
        assert runner.kv is not None
        return runner.model.logits(runner.model.forward(batch, runner.kv))

    def replay(self, batch: ModelWorkerBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(rows int64[n], seq_lens int64[n], logits float32[n, vocab]) of a decode batch, on the device."""
        count = batch.decode_tokens
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        staged = np.empty((2, size), np.int64)
        staged[0, :count], staged[0, count:] = batch.rows, self._runner.rows
        staged[1, :count], staged[1, count:] = batch.seq_lens, 1
        packed = torch.from_numpy(staged).pin_memory().to(self._runner.device, non_blocking=True)
        self._rows[:size].copy_(packed[0])
        self._seq_lens[:size].copy_(packed[1])
        graph, logits = self._graphs[size]
        graph.replay()
        return packed[0, :count], packed[1, :count], logits[:count]
