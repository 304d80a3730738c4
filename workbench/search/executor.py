"""Executors of a search's runs: processes of this machine, or a Ray cluster. One interface, the same work.

On this machine every task gets a process of its own, forked from the one that has parsed the trace and looked up models
and GPUs, so tasks share all of that without copying it, and start in milliseconds. A process can be killed at its time
limit wherever it is, and one that dies takes nothing else with it: with the pool of concurrent.futures either of the two
breaks the pool. Forking is safe because the parent has no threads. Where there is no fork, processes are spawned and sent
the same things.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from ground.errors import InputError

Work = Callable[[Any], Any]
"""Takes a task, returns its result. Must be picklable for Ray, as must task and result."""


class ExecutorError(InputError):
    """An executor that cannot be used, in one line."""


@dataclass(frozen=True)
class Done:
    """A task that is over: with a result, or with the reason why there is none."""

    key: Hashable
    result: Any = None
    timed_out: bool = False
    fault: str | None = None
    """What went wrong in one line, when it was not bad input."""


class Executor(Protocol):
    """Runs tasks side by side. Leave its context to stop whatever still runs."""

    @property
    def running(self) -> int: ...
    @property
    def free(self) -> bool:
        """Whether another task would start now."""
        ...

    def start(self, key: Hashable, task: Any) -> None: ...
    def wait(self, timeout_s: float) -> list[Done]:
        """Tasks that are over; waits that long for the first."""
        ...


@contextlib.contextmanager
def open_executor(kind: str, work: Work, jobs: int | None, time_limit_s: float | None) -> Iterator[Executor]:
    """`local` or `ray`, with so many tasks at a time (None: as many as there are CPUs).

    Raises ExecutorError for an unknown kind, a number of jobs below 1, or `ray` without the package.
    """
    check_executor(kind, jobs, time_limit_s)
    executor: LocalExecutor | RayExecutor
    if kind == "local":
        executor = LocalExecutor(work, jobs or available_cpus(), time_limit_s)
    else:
        executor = RayExecutor(work, jobs, time_limit_s)
    try:
        yield executor
    finally:
        executor.close()


def check_executor(kind: str, jobs: int | None, time_limit_s: float | None) -> None:
    """Check an executor's settings before there is anything to run. Raises ExecutorError as `open_executor` would."""
    if kind not in ("local", "ray"):
        raise ExecutorError(f"executor: {kind!r} is not one of local, ray")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise ExecutorError("executor: ray is not installed; pip install 'llm-workbench[ray]'")
    if jobs is not None and jobs < 1:
        raise ExecutorError(f"jobs: {jobs} is less than 1")
    if time_limit_s is not None and not 0 < time_limit_s < float("inf"):
        raise ExecutorError(f"time_limit: {time_limit_s} is not positive")


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Child:
    key: Hashable
    process: Any
    answer: Connection
    due_s: float


class LocalExecutor:
    """A process a task, at most `jobs` at a time."""

    def __init__(self, work: Work, jobs: int, time_limit_s: float | None) -> None:
        self._work, self._jobs, self._limit_s = work, jobs, time_limit_s
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._children: list[_Child] = []
        # What is here now is here to stay: children should not touch (and so copy) it when they collect garbage.
        gc.freeze()

    @property
    def running(self) -> int:
        return len(self._children)

    @property
    def free(self) -> bool:
        return len(self._children) < self._jobs

    def start(self, key: Hashable, task: Any) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(theirs, self._work, task), daemon=True)
        # Ctrl-C waits while the child is forked: a child it hit before ignoring it would complain, and half exist.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        due_s = time.monotonic() + self._limit_s if self._limit_s is not None else float("inf")
        self._children.append(_Child(key, process, ours, due_s))

    def wait(self, timeout_s: float) -> list[Done]:
        if not self._children:
            return []
        until_due_s = min(child.due_s for child in self._children) - time.monotonic()
        answered = wait([child.answer for child in self._children], max(min(timeout_s, until_due_s), 0.0))
        done = []
        now = time.monotonic()
        for child in list(self._children):
            if child.answer in answered:
                done.append(self._collect(child))
            elif now >= child.due_s:
                self._end(child)
                done.append(Done(child.key, timed_out=True))
        return done

    def _collect(self, child: _Child) -> Done:
        try:
            result, fault = child.answer.recv()
        except (EOFError, OSError):
            child.process.join()
            return self._ended(child, Done(child.key, fault=_death(child.process.exitcode)))
        child.process.join()
        return self._ended(child, Done(child.key, result=result, fault=fault))

    def _ended(self, child: _Child, done: Done) -> Done:
        child.answer.close()
        self._children.remove(child)
        return done

    def _end(self, child: _Child) -> None:
        child.process.kill()
        child.process.join()
        child.answer.close()
        self._children.remove(child)

    def close(self) -> None:
        """Kill what still runs."""
        for child in list(self._children):
            self._end(child)
        gc.unfreeze()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed ({signal.Signals(-code).name}); out of memory is the usual reason"
    return f"its process ended with code {code} before it was done"


def _child(answer: Connection, work: Work, task: Any) -> None:
    """Run a task in its process. Ctrl-C is the parent's business; a parent that is gone ends the child too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    answer.send(guarded(work, task))
    answer.close()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def guarded(work: Work, task: Any) -> tuple[Any, str | None]:
    """(result, None), or (None, what went wrong and where, in one line)."""
    try:
        return work(task), None
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {text} ({os.path.basename(at.filename)}:{at.lineno})"


class _OverTime(BaseException):
    """Raised in a task whose time is up.

    A BaseException: an ``except Exception`` in the task would take it for an error of its own.
    """


def guarded_within(work: Work, task: Any, limit_s: float | None) -> tuple[Any, str | None, bool]:
    """`guarded`, and whether the time was up first. The clock starts here: what a cluster needs to start a worker does not
    count. For the main thread, which is where Ray runs tasks."""

    def stop(*_: Any) -> None:
        raise _OverTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit_s or 0)
        return *guarded(work, task), False
    except _OverTime:
        return None, None, True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class RayExecutor:
    """The same on a Ray cluster: the one in RAY_ADDRESS, else one on this machine. The work, with the trace inside it, is
    put into the object store once."""

    def __init__(self, work: Work, jobs: int | None, time_limit_s: float | None) -> None:
        import ray

        self._ray = ray
        self._limit_s = time_limit_s
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(logging_level="error", log_to_driver=False, include_dashboard=False)
        self._jobs = jobs or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._shared = ray.put(work)
        # No retries: a worker that dies has its task recorded as failed, as on one machine.
        self._remote = ray.remote(max_retries=0, num_cpus=1)(guarded_within)
        self._refs: dict[Any, Hashable] = {}

    @property
    def running(self) -> int:
        return len(self._refs)

    @property
    def free(self) -> bool:
        return len(self._refs) < self._jobs

    def start(self, key: Hashable, task: Any) -> None:
        self._refs[self._remote.remote(self._shared, task, self._limit_s)] = key

    def wait(self, timeout_s: float) -> list[Done]:
        if not self._refs:
            return []
        ready, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout_s)
        return [self._collect(ref) for ref in ready]

    def _collect(self, ref: Any) -> Done:
        key = self._refs.pop(ref)
        try:
            result, fault, timed_out = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return Done(key, fault=" ".join(str(error).split())[:300])
        return Done(key, result, timed_out, fault)

    def close(self) -> None:
        """Cancel what still runs; shut down the cluster if it was started here."""
        for ref in self._refs:
            self._ray.cancel(ref, force=True)
        if self._own:
            self._ray.shutdown()
