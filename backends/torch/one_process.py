"""A single rank that runs in the scheduler's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.torch.device_clock import DeviceClock
from backends.torch.parallel import SINGLE
from backends.torch.rank import Rank
from backends.torch.runner import Output
from backends.torch.sampler import DeviceLogprobs
from backends.torch.signs import cpu_clock
from backends.torch.workers import Result, RunnerOptions, dtype_names, kv_capacity, load_runner, on_host
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch, StepOutput


class _OneProcess:
    """A single rank in this process."""

    def __init__(self, options: RunnerOptions, device: torch.device) -> None:
        self.runner = load_runner(options, SINGLE, device)
        self.rank = Rank(self.runner, fp8=options.fp8, max_context=options.max_context)
        self.kv_tokens = kv_capacity(self.runner, options)
        self.max_context = self.runner.max_context
        self.eos_token_ids = self.runner.config.eos_token_ids
        self.vocab = self.runner.config.vocab
        self.dtype, self.kv_dtype = dtype_names(self.runner)
        self.runner.allocate(self.kv_tokens // options.page_size)
        self.runner.capture(list(options.capture_sizes))
        self.worked_s: Callable[[], float] = lambda: 0.0
        self._reading = threading.Lock()

    def heard_s(self) -> float:
        return time.monotonic()

    def read_kv(self, rank: int, pages: np.ndarray) -> np.ndarray:
        assert self.runner.kv_pages is not None
        with self._reading:
            return self.runner.kv_pages.read(pages)

    def write_kv(self, rank: int, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        assert self.runner.kv_pages is not None
        with self._reading:
            self.runner.kv_pages.write(layers, heads, pages, block)

    def failure(self) -> str | None:
        return None

    def end_asked(self) -> str | None:
        return None


class CpuWorker(_OneProcess):
    """A thread that computes while the scheduler's thread goes on: torch lets the interpreter go meanwhile."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options, torch.device("cpu"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._masks: SimpleQueue[np.ndarray | None] = SimpleQueue()
        """Of the last batch with masked rows. Each has a queue of its own: one that fails leaves its masks there."""
        self.worked_s = self._thread.submit(cpu_clock).result()

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        if batch.masked is not None:
            self._masks.put(None)  # for the one before, if its loop has failed and left it waiting
            self._masks = SimpleQueue()
        future: Future[Result] = self._thread.submit(self._run, batch, self._masks)
        return future.result

    def sample(self, masks: np.ndarray | None) -> None:
        self._masks.put(masks)

    def _run(self, batch: ModelWorkerBatch, masks: SimpleQueue[np.ndarray | None]) -> Result:
        start = time.monotonic()
        out = self.rank.run(batch)
        if batch.masked is not None:
            out = self.rank.sample(masks.get())
        assert out.tokens is not None
        output = StepOutput(out.tokens.numpy(), logprobs=on_host(out.logprobs), prompt_logprobs=out.prompt_logprobs)
        result = Result(output, [(start, time.monotonic())])
        self.rank.ran()
        return result

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        return [self._thread.submit(errand, self.rank, *args).result()]

    def close(self, patience_s: float = 5.0) -> None:
        """Waits for what is being computed, however long it takes."""
        if self.rank.profile is not None:
            self.everywhere(Rank.close)
        self._masks.put(None)  # for a batch that nobody will sample any more
        self._thread.shutdown(wait=True, cancel_futures=True)


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch on a GPU."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    tokens: Tensor | None = None
    """Pinned, as are ``logprobs``; read once ``end`` has come."""
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: dict[int, tuple[int, Logprobs]] | None = None


class CudaWorker(_OneProcess):
    """Launches from the caller's thread, asynchronously; results come back through pinned memory and an event.

    All of it is in one stream, so every step sees what those before it have written: last tokens, pages, keys and values,
    and the buffers of the CUDA graphs. The pinned memory of a result lives until it has been read.
    """

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options, torch.device("cuda", 0))
        began = torch.cuda.Event(enable_timing=True)
        began.record()
        began.synchronize()
        self._clock = DeviceClock(began, time.monotonic())

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The start is recorded right in front of the computation: a device with nothing to do passes an event at once, and
        # the host's preparation of the step would count as its work.
        out = self.rank.run(batch, begin=start.record)
        flight = self._newest = _Flight(start, end)
        if batch.masked is None:
            self._take(flight, out)
        return lambda: self._result(flight)

    def sample(self, masks: np.ndarray | None) -> None:
        self._take(self._newest, self.rank.sample(masks))

    def _take(self, flight: _Flight, out: Output) -> None:
        """Send what was sampled on its way to the host."""
        assert out.tokens is not None
        flight.tokens = _to_host(out.tokens)
        flight.prompt_logprobs = out.prompt_logprobs
        if out.logprobs is not None:
            found = out.logprobs
            flight.logprobs = DeviceLogprobs(_to_host(found.sampled), _to_host(found.top), _to_host(found.top_ids))
        flight.end.record()
        self.rank.ran()

    def _result(self, flight: _Flight) -> Result:
        assert flight.tokens is not None, "a batch with masked rows samples in a second phase, which comes first"
        waited = not flight.end.query()
        flight.end.synchronize()
        stage = self._clock.at(flight.start, flight.end, time.monotonic(), waited)
        tokens, logprobs = flight.tokens.numpy().copy(), on_host(flight.logprobs)
        return Result(StepOutput(tokens, logprobs=logprobs, prompt_logprobs=flight.prompt_logprobs), [stage])

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        torch.cuda.synchronize()  # a profile begins with the next batch, not with what is left of the one before
        return [errand(self.rank, *args)]

    def close(self, patience_s: float = 5.0) -> None:
        self.rank.close()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy into pinned memory that is done when the stream is."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
