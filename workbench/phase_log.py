"""The rows of iterations.csv, and what the CPU did for each: one account for every backend."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Generic, NamedTuple, Protocol, TypeVar

from workbench.backend import Phase
from workbench.scheduler.batch import MODES, ModelWorkerBatch


class IterationRow(NamedTuple):
    """One line of iterations.csv, a batch on one stage, in the order of its columns (docs/run-record.md). Times are seconds
    of the run's clock."""

    iteration: int
    instance: int
    stage: int
    mode: int
    """The place of the batch's mode in ``workbench.scheduler.batch.MODES``."""
    launch_s: float
    start_s: float
    end_s: float
    requests: int
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int
    kv_used_tokens: int
    waiting: int
    running: int
    receive_s: float
    schedule_s: float
    launch_host_s: float
    process_s: float
    """The four CPU phases belong to the iteration, and stand in the row of its first stage."""


LogIteration = Callable[[IterationRow], None]
"""Where rows go."""
MODE_CODES = {mode: code for code, mode in enumerate(MODES)}

# A row is made on every step: what it takes of the batch is found at once, and no function is called with all of it.
_logged = itemgetter(
    *map(
        ModelWorkerBatch._fields.index,
        (
            "step",
            "mode",
            "rows",
            "prefill_tokens",
            "decode_tokens",
            "context_tokens",
            "kv_used_tokens",
            "waiting",
            "running",
        ),
    )
)
_new = tuple.__new__


class Launched(Protocol):
    """The facts of a forward that the account needs."""

    batch: ModelWorkerBatch
    cpu_s: tuple[float, float, float]
    """What receiving, scheduling and launching it took. Set by the account."""

    @property
    def launch_s(self) -> float:
        """When it was launched."""
        ...

    @property
    def starts_s(self) -> Sequence[float]:
        """When each stage began with it. Asked once its result is there, as are ``ends_s``."""
        ...

    @property
    def ends_s(self) -> Sequence[float]: ...


Forward = TypeVar("Forward", bound=Launched)


class PhaseLog(Generic[Forward]):
    """The account of one instance: CPU phases as they are noted, and a row for every stage of a batch that is processed.

    A backend notes what a phase took: modelled seconds, or measured ones (:class:`MeasuredPhases`).
    """

    __slots__ = ("_log", "instance", "pending", "receive_s", "schedule_s")

    def __init__(self, log_iteration: LogIteration, instance: int = 0) -> None:
        self._log = log_iteration
        self.instance = instance
        self.pending: deque[Forward] = deque()
        """Launched and not yet processed, oldest first."""
        self.receive_s = self.schedule_s = 0.0
        """What has been spent for the next launch. Looks at the inbox that bring no batch count for the batch after them."""

    def log_to(self, log_iteration: LogIteration) -> None:
        """Have the rows go somewhere else from now on."""
        self._log = log_iteration

    def launched(self, forward: Forward, seconds: float) -> None:
        """A batch has been launched, which took the CPU so long."""
        forward.cpu_s = self.receive_s, self.schedule_s, seconds
        self.receive_s = self.schedule_s = 0.0
        self.pending.append(forward)

    def abandon(self) -> None:
        """Forget what was launched and what was spent for the next launch: a step has failed, and its loop has ended."""
        self.pending.clear()
        self.receive_s = self.schedule_s = 0.0

    def processed(self, forward: Forward, process_s: float) -> None:
        """A batch has been processed, which took the CPU so long: log its rows. Who says so takes it out of ``pending``."""
        step, mode, rows, prefill_tokens, decode_tokens, context_tokens, kv_used, waiting, running = _logged(
            forward.batch
        )
        receive_s, schedule_s, launch_host_s = forward.cpu_s
        ends_s = forward.ends_s
        for stage, start_s in enumerate(forward.starts_s):
            self._log(
                _new(
                    IterationRow,
                    (
                        step,
                        self.instance,
                        stage,
                        MODE_CODES[mode],
                        forward.launch_s,
                        start_s,
                        ends_s[stage],
                        len(rows),
                        prefill_tokens,
                        decode_tokens,
                        context_tokens,
                        kv_used,
                        waiting,
                        running,
                        receive_s,
                        schedule_s,
                        launch_host_s,
                        process_s,
                    ),
                )
            )
            receive_s = schedule_s = launch_host_s = process_s = 0.0  # of the iteration, not of each of its stages


class MeasuredPhases(PhaseLog[Forward]):
    """The account of a live instance: a phase takes the time between the note before, or the end of the last wait, and its
    own note."""

    __slots__ = ("_clock", "_mark_s", "launching")

    def __init__(
        self, log_iteration: LogIteration, instance: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``clock`` says what counts as spent: all time, or this thread's CPU time."""
        super().__init__(log_iteration, instance)
        self._clock = clock
        self._mark_s = clock()
        self.launching: Forward | None = None
        """The forward that the next note of a launch is about. Set by the backend."""

    def note(self, phase: Phase) -> None:
        """A phase is over."""
        now_s = self._clock()
        spent_s, self._mark_s = now_s - self._mark_s, now_s
        if phase == "receive":
            self.receive_s += spent_s
        elif phase == "schedule":
            self.schedule_s += spent_s
        elif phase == "launch":
            assert self.launching is not None, "a launch is noted after it"
            self.launched(self.launching, spent_s)
        elif phase == "process":
            self.processed(self.pending.popleft(), spent_s)
            self.rested()
        else:
            raise ValueError(f"unknown CPU phase {phase!r}")

    def rested(self) -> None:
        """A wait, or work that belongs to no phase, is over."""
        self._mark_s = self._clock()
