"""Workers that run a batch: this process, or one for each rank of a tensor- and pipeline-parallel group.

Either way batches run in the order in which they were submitted, and the scheduler waits for nothing but results. Here is
what both have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from backends.node_place import NodePlace
from backends.torch.loader import load_model
from backends.torch.ops import load_ops
from backends.torch.parallel import Parallel
from backends.torch.runner import ModelRunner, NoRoomForKV
from backends.torch.sampler import DeviceLogprobs
from workbench.backend import BackendDied
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch, StepOutput


@dataclass(frozen=True)
class RunnerOptions:
    """Options with which a rank loads its share of a model and runs it."""

    model: str
    device: str = "cpu"
    """``cpu`` or ``cuda``; each rank of a machine takes a GPU of it, in order."""
    dtype: str | None = None
    """Of weights and activations, as torch calls it; None: as saved."""
    fp8: bool = False
    """Hold the projections in FP8."""
    load_format: str = "auto"
    ops: str | None = None
    tp: int = 1
    pp: int = 1
    rows: int = 256
    """Requests that hold KV at a time."""
    max_context: int | None = None
    page_size: int = 1
    mem_fraction: float = 0.9
    kv_tokens: int | None = None
    """KV capacity; None finds it from memory."""
    step_tokens: int = 8192
    """Most prompt tokens of one batch: what working memory is measured with."""
    capture_sizes: tuple[int, ...] = ()
    """Decode batch sizes to capture as CUDA graphs."""
    seed: int = 0
    cpu_kv_bytes: int = 4 * 2**30
    """On a CPU: bytes of KV unless ``kv_tokens`` says how many tokens."""
    place: NodePlace | None = None
    """This machine's among several that hold the model; None: it holds all of it."""

    @property
    def node(self) -> int:
        """Number of this machine among those that hold the model."""
        return 0 if self.place is None else self.place.rank

    @property
    def ranks_here(self) -> range:
        """The ranks that are on this machine: as many on each, in order."""
        here = self.tp * self.pp // (1 if self.place is None else self.place.count)
        return range(self.node * here, (self.node + 1) * here)


class Result(NamedTuple):
    """Result of a batch, on the host."""

    output: StepOutput
    stages: list[tuple[float, float]]
    """(start, end) on each stage, in seconds of the monotonic clock."""


class Workers(Protocol):
    """Runs batches. ``submit`` returns a function that blocks until that batch's result is there."""

    kv_tokens: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    vocab: int
    dtype: str
    """Of the weights, as torch calls it: ``bfloat16``; ``fp8`` where the projections are."""
    kv_dtype: str
    """Of keys and values, as torch calls it: that of the weights, or of what is computed with FP8 ones."""

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]: ...

    def sample(self, masks: np.ndarray | None) -> None:
        """Sample the batch that was submitted last, which has ``masked`` rows; ``masks`` as in ``Backend.sample``."""
        ...

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        """Do something to every rank, a method of :class:`Rank`, after the batches submitted so far and before the next;
        returns what each has answered.

        Raises ValueError, the first rank's, when any of them does.
        """
        ...

    def read_kv(self, rank: int, pages: np.ndarray) -> np.ndarray:
        """Return a copy of a rank's share of pages int32[k]: uint8[layers, heads, k, page_bytes]. It and
        :meth:`write_kv` block, and may be called from any thread while batches run."""
        ...

    def write_kv(self, rank: int, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        """Write layers and heads of a rank's share of pages int32[k]."""
        ...

    def worked_s(self) -> float:
        """Grows while a batch computes. On a GPU it stands: nothing tells a long step of it from one that hangs."""
        ...

    def heard_s(self) -> float:
        """``time.monotonic()`` when the rank that is silent longest was last heard of."""
        ...

    def failure(self) -> str | None:
        """What has ended while nobody waited for it, in one line; None while nothing has."""
        ...

    def end_asked(self) -> str | None:
        """Who, beside the server's own process, was told to end it, in words."""
        ...

    def close(self, patience_s: float = 5.0) -> None:
        """End the ranks. One that runs a profile writes it, if it takes no longer than ``patience_s``."""
        ...


class WorkerDied(BackendDied):
    """A rank's process ended or failed; the message says which and why, in one line."""


def load_runner(options: RunnerOptions, parallel: Parallel, device: torch.device) -> ModelRunner:
    """One rank's share of the model, ready for its KV pool to be allocated."""
    ops = load_ops(options.ops, device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model, config = load_model(
        options.model,
        dtype=dtype,
        device=device,
        ops=ops,
        parallel=parallel,
        load_format=options.load_format,  # type: ignore[arg-type]
        max_context=options.max_context,
        seed=options.seed,
        fp8=options.fp8,
    )
    return ModelRunner(
        model,
        config,
        ops,
        device,
        rows=options.rows,
        max_context=config.max_context,
        page_size=options.page_size,
        seed=options.seed,
    )


def kv_capacity(runner: ModelRunner, options: RunnerOptions) -> int:
    """Tokens of KV that a rank can hold. Raises NoRoomForKV."""
    if options.kv_tokens is not None:
        return options.kv_tokens
    if runner.device.type == "cuda":
        return runner.measure_kv_tokens(
            options.mem_fraction, options.step_tokens, max(options.capture_sizes, default=0)
        )
    tokens = min(options.cpu_kv_bytes // runner.kv_bytes_per_token, options.rows * runner.max_context)
    if tokens < options.page_size:
        raise NoRoomForKV(f"kv_tokens: {options.cpu_kv_bytes} bytes hold no page of {options.page_size} tokens")
    return tokens


def dtype_names(runner: ModelRunner) -> tuple[str, str]:
    """(of the weights, of keys and values)."""
    computed = str(runner.config.dtype or torch.float32).removeprefix("torch.")
    return computed if runner.config.fp8 is None else "fp8", computed


def on_host(logprobs: DeviceLogprobs | None) -> Logprobs | None:
    """A copy of what lies in the host's memory by now."""
    if logprobs is None:
        return None
    return Logprobs(logprobs.sampled.numpy().copy(), logprobs.top.numpy().copy(), logprobs.top_ids.numpy().copy())
