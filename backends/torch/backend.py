"""The real backend behind an event loop: it launches batches on a model and reads the clock where a simulation adds up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from backends.torch.rank import Rank
from backends.torch.workers import Result, RunnerOptions, Workers, start_workers
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

MODE_CODES = {"prefill": 0, "decode": 1, "mixed": 2}
LogIteration = Callable[..., None]
TRACE_S = 40.0
"""How long the ranks may take at the end to write a profile that still runs."""


class TorchForward:
    """A batch that has been launched."""

    __slots__ = ("_result", "_wait", "batch", "cpu_s", "launch_s")

    def __init__(self, batch: ModelWorkerBatch, wait: Callable[[], Result], launch_s: float) -> None:
        self.batch = batch
        self._wait = wait
        self._result: Result | None = None
        self.launch_s = launch_s
        self.cpu_s = (0.0, 0.0, 0.0)
        """What receiving, scheduling and launching it took."""

    def result(self) -> Result:
        """What came of it; blocks until it is there."""
        if self._result is None:
            self._result = self._wait()
        return self._result

    def output(self) -> StepOutput:
        return self.result().output


class TorchBackend:
    """One instance. Its waits are functions that block, or None.

    A CPU phase is the time between the note before, or the end of the last wait, and its own note. ``log_iteration`` takes
    one row of iterations.csv, positional, in the order of its columns; times are seconds since ``began_s``.
    """

    def __init__(
        self, workers: Workers, log_iteration: LogIteration, instance: int = 0, began_s: float | None = None
    ) -> None:
        self.workers = workers
        self.kv_tokens, self.max_context = workers.kv_tokens, workers.max_context
        self.eos_token_ids, self.vocab = workers.eos_token_ids, workers.vocab
        self.dtype, self.kv_dtype = workers.dtype, workers.kv_dtype
        self.began_s = time.monotonic() if began_s is None else began_s
        self._log, self._instance = log_iteration, instance
        self._mark = time.perf_counter()
        self._phases = {"receive": 0.0, "schedule": 0.0, "launch": 0.0}
        self._pending: deque[TorchForward] = deque()
        self._profiled = False

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began_s

    def host(self, phase: str, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        if phase == "process":
            self._write(self._pending.popleft(), spent)
            self._mark = time.perf_counter()
        elif phase == "receive":
            self._phases["receive"] += spent
        elif phase == "schedule":
            self._phases["schedule"] = spent
        elif phase == "launch":
            phases = self._phases
            self._pending[-1].cpu_s = phases["receive"], phases["schedule"], spent
            phases["receive"] = 0.0
        else:
            raise ValueError(f"unknown CPU phase {phase!r}")

    def launch(self, batch: ModelWorkerBatch) -> TorchForward:
        """Raises NotImplementedError for a batch that asks for more than a model does here."""
        if batch.decode_tokens != batch.decodes:
            raise NotImplementedError("query_lens: the torch backend decodes one token a row and verifies no drafts")
        wait = self.workers.submit(batch)
        forward = TorchForward(batch, wait, self.now_s())
        self._pending.append(forward)
        return forward

    def done(self, forward: TorchForward) -> Callable[[], object]:
        return forward.result

    def cpu(self) -> None:
        """CPU phases have passed when they are noted."""
        return None

    def rested(self) -> None:
        """A wait is over: it belongs to no phase. The loop's driver tells."""
        self._mark = time.perf_counter()

    def log_to(self, log_iteration: LogIteration) -> None:
        """Have the rows of iterations go somewhere else from now on."""
        self._log = log_iteration

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
        if self._profiled:
            self.workers.close(TRACE_S)
        else:
            self.workers.close()

    def _write(self, forward: TorchForward, process_s: float) -> None:
        batch = forward.batch
        receive_s, schedule_s, launch_s = forward.cpu_s
        for stage, (start, end) in enumerate(forward.result().stages):
            self._log(
                batch.step,
                self._instance,
                stage,
                MODE_CODES[batch.mode],
                forward.launch_s,
                start - self.began_s,
                end - self.began_s,
                len(batch.rows),
                batch.prefill_tokens,
                batch.decode_tokens,
                batch.context_tokens,
                batch.kv_used_tokens,
                batch.waiting,
                batch.running,
                receive_s,
                schedule_s,
                launch_s,
                process_s,
            )
            receive_s = schedule_s = launch_s = process_s = 0.0  # they belong to the iteration, not to each stage of it


def make_backend(
    options: RunnerOptions, log_iteration: LogIteration, instance: int = 0, began_s: float | None = None
) -> TorchBackend:
    """Load a model and be ready to serve it. Raises what :func:`backends.torch.workers.start_workers` raises."""
    return TorchBackend(start_workers(options), log_iteration, instance, began_s)
