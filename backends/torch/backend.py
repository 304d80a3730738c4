"""The real backend behind an event loop: it launches batches on a model and reads the clock where a simulation adds up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from backends.torch.kv_pages import KVShare, SavedKV
from backends.torch.many_ranks import ManyWorkers
from backends.torch.one_process import CpuWorker, CudaWorker
from backends.torch.rank import Rank
from backends.torch.workers import Result, RunnerOptions, Workers
from workbench.backend import Phase
from workbench.phase_log import LogIteration, MeasuredPhases
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

TRACE_S = 40.0
"""How long the ranks may take at the end to write a profile that still runs."""


class TorchForward:
    """A batch that has been launched."""

    __slots__ = ("_began_s", "_result", "_wait", "batch", "cpu_s", "launch_s", "number")

    def __init__(self, batch: ModelWorkerBatch, wait: Callable[[], Result], launch_s: float, began_s: float) -> None:
        """``began_s``: when the run began, in seconds of the monotonic clock; the other times count from there."""
        self.batch = batch
        self._wait = wait
        self._began_s = began_s
        self._result: Result | None = None
        self.launch_s = launch_s
        self.cpu_s = (0.0, 0.0, 0.0)
        self.number = 0
        """In the order of launches, from 1 on."""

    def result(self) -> Result:
        """Return what came of it; blocks until it is there."""
        if self._result is None:
            self._result = self._wait()
        return self._result

    def output(self) -> StepOutput:
        return self.result().output

    @property
    def starts_s(self) -> list[float]:
        return [start_s - self._began_s for start_s, _ in self.result().stages]

    @property
    def ends_s(self) -> list[float]:
        return [end_s - self._began_s for _, end_s in self.result().stages]


class KVFacts(NamedTuple):
    """The KV of a backend."""

    shares: list[KVShare]
    """Of each rank."""
    config: str
    """What the model's configuration says."""
    weights: list[str]
    """Hashes of samples of the weights, by layer."""
    head_dim: int


class TorchBackend:
    """One instance. Its waits are functions that block, or None.

    Times are seconds since ``began_s``.
    """

    def __init__(
        self, workers: Workers, log_iteration: LogIteration, instance: int = 0, began_s: float | None = None
    ) -> None:
        self.workers = workers
        self.kv_tokens, self.max_context = workers.kv_tokens, workers.max_context
        self.eos_token_ids, self.vocab = workers.eos_token_ids, workers.vocab
        self.dtype, self.kv_dtype = workers.dtype, workers.kv_dtype
        self.began_s = time.monotonic() if began_s is None else began_s
        self.phases: MeasuredPhases[TorchForward] = MeasuredPhases(log_iteration, instance)
        self._profiled = False
        self._launched = 0
        self._landed: float = 0
        """Number of the newest batch that has run; infinite once none will any more."""
        self._landing = threading.Condition()

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began_s

    def host(self, phase: Phase, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        self.phases.note(phase)

    def launch(self, batch: ModelWorkerBatch) -> TorchForward:
        """Launch a batch. Raises NotImplementedError where it asks for more than a model does here."""
        if batch.decode_tokens != batch.decodes:
            raise NotImplementedError("query_lens: the torch backend decodes one token a row and verifies no drafts")
        if batch.kv_copies:
            unknown = {copy.direction for copy in batch.kv_copies} - SavedKV.DIRECTIONS
            if unknown:
                asked = ", ".join(sorted(unknown))
                raise NotImplementedError(f"kv_copies: the torch backend does not copy KV pages ({asked}) with a batch")
        try:
            wait = self.workers.submit(batch)
        except BaseException:
            self.phases.abandon()
            raise
        self.phases.launching = forward = TorchForward(batch, wait, self.now_s(), self.began_s)
        self._launched += 1
        forward.number = self._launched
        return forward

    def sample(self, forward: TorchForward, masks: np.ndarray | None = None) -> None:
        """Sample under masks. Raises ValueError where their shape is not the batch's rows by the vocabulary."""
        masked = forward.batch.masked
        assert masked is not None and forward is self.phases.launching, "masks are for the batch launched last"
        words = -(-self.vocab // 32)
        if masks is not None and (masks.dtype != np.int32 or masks.shape != (len(masked), words)):
            raise ValueError(
                f"masks: {masks.dtype}{list(masks.shape)}, and {len(masked)} rows over {self.vocab} tokens need "
                f"int32[{len(masked)}, {words}]"
            )
        try:
            self.workers.sample(masks)
        except BaseException:
            self.phases.abandon()
            raise
        self.phases.rested()  # what it took to make the masks is no phase of an iteration

    def copied(self, forward: TorchForward) -> Callable[[], object] | None:
        return partial(self._wait, forward) if forward.batch.kv_copies else None

    def done(self, forward: TorchForward) -> Callable[[], object]:
        return partial(self._wait, forward)

    def _wait(self, forward: TorchForward) -> None:
        try:
            forward.result()
        except BaseException:
            # Here as in the launch: a step that fails ends its loop, and nobody will process what is in flight. The next
            # loop must not take it for its own.
            self.phases.abandon()
            self._have_landed(math.inf)
            raise
        self._have_landed(forward.number)

    def landed(self) -> Callable[[], object]:
        """Return a wait, for any other thread, until the batches launched by now have run, or none will any more."""
        return partial(self._await_landing, self._launched)

    def _await_landing(self, number: int) -> None:
        with self._landing:
            self._landing.wait_for(lambda: self._landed >= number)

    def _have_landed(self, number: float) -> None:
        if number > self._landed:
            with self._landing:
                self._landed = number
                self._landing.notify_all()

    def cpu(self) -> None:
        """CPU phases have passed when they are noted."""
        return None

    def rested(self) -> None:
        """A wait is over: it belongs to no phase. The loop's driver tells."""
        self.phases.rested()

    def log_to(self, log_iteration: LogIteration) -> None:
        """Have the rows of iterations go somewhere else from now on."""
        self.phases.log_to(log_iteration)

    def kv_facts(self) -> KVFacts:
        """Say what the KV here is of, and who holds what of it."""
        shares, samples = self._everywhere(Rank.kv_share), self._everywhere(Rank.weights_sample)
        config, head_dim = self._everywhere(Rank.config_text)[0], self._everywhere(Rank.head_dim)[0]
        return KVFacts(shares, config, [sample for each in samples for sample in each], head_dim)

    def check_weights(self, folder: str) -> None:
        """Look whether the checkpoint in ``folder`` can take the place of the weights. Raises ValueError, in one line."""
        self._everywhere(Rank.check_weights, folder)

    def write_weights(self) -> None:
        """Put the weights that were looked at last in their place. Nothing may be in flight. What it raises leaves the
        backend unusable."""
        self._everywhere(Rank.write_weights)

    def start_profile(self, folder: str, steps: int | None) -> None:
        """Profile every rank from the next batch on, into ``folder``; ``steps`` None: until it is stopped.

        Raises ValueError, in one line. The first profile takes a few seconds to begin, in which torch loads what it needs.
        """
        self._everywhere(Rank.check_profile, folder)
        self._profiled = True
        self._everywhere(Rank.start_profile, folder, steps)

    def stop_profile(self) -> list[str]:
        """Write the profile and return its files, one a rank. Raises ValueError, in one line."""
        return self._everywhere(Rank.stop_profile)

    def _everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return self.workers.everywhere(errand, *args)
        finally:
            self.rested()  # it belongs to no phase of an iteration

    def close(self) -> None:
        self._have_landed(math.inf)
        if self._profiled:
            self.workers.close(TRACE_S)
        else:
            self.workers.close()


def check_device(options: RunnerOptions) -> None:
    """Raise ValueError, in one line, for a device that is not there."""
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device: cuda was asked for and torch sees no GPU")
        needed = len(options.ranks_here)
        if torch.cuda.device_count() < needed:
            spread = "" if options.place is None else f" over {options.place.count} nodes"
            here = f"{torch.cuda.device_count()}" + ("" if options.place is None else " on this one")
            raise ValueError(f"tp {options.tp} x pp {options.pp}{spread} needs {needed} GPUs, there are {here}")


def start_workers(options: RunnerOptions) -> Workers:
    """Load the model, find the KV capacity, and be ready to run batches.

    Raises ModelNotFound, UnsupportedModel, BadCheckpoint, NoRoomForKV, ValueError for a device that is not there, or
    WorkerDied for a rank that ends, or does not come.
    """
    check_device(options)
    if options.tp * options.pp > 1:
        return ManyWorkers(options)
    return CudaWorker(options) if options.device == "cuda" else CpuWorker(options)


def make_backend(
    options: RunnerOptions, log_iteration: LogIteration, instance: int = 0, began_s: float | None = None
) -> TorchBackend:
    """Load a model and be ready to serve it. Raises what :func:`start_workers` raises."""
    return TorchBackend(start_workers(options), log_iteration, instance, began_s)
