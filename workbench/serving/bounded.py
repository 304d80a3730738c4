"""Work whose time and memory nobody knows before: done in processes of its own, within bounds that are the kernel's.

What cannot be interrupted from another thread, nor kept from growing, runs in a worker, one task at a time, and who waits
for it may end it by ending the process. A task that breaks its worker breaks nothing else.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import resource
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from workbench.serving.child import begin_child
from workbench.serving.threads import in_thread

SILENT_S = 120.0
"""A worker that has not answered for so long does not run."""
_preload = ["__main__", "workbench.serving.bounded"]
"""Imported once, in the process that all workers are copies of."""


class WorkerEnded(Exception):
    """The end of a worker before it had an answer: the task took what no process gets."""


def run_worker(connection: Connection, do: Callable[[Any], bytes], memory_bytes: int, memory_factor: int = 0) -> None:
    """Run a worker: answer each task by ``do``, until nobody asks any more. Every task may take its processor time,
    ``memory_bytes`` beyond what the worker itself has, and for each byte of the task ``memory_factor`` more."""
    begin_child()
    for number in (signal.SIGTERM, signal.SIGPROF):  # nothing is lost with it
        signal.signal(number, signal.SIG_DFL)
    own_bytes = _address_space_bytes()
    while True:
        try:
            asked = connection.recv_bytes()
        except EOFError:
            return
        if own_bytes is not None:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (own_bytes + memory_bytes + memory_factor * len(asked), hard))
        task, cpu_s = pickle.loads(asked)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process
        try:
            answer = do(task)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def _address_space_bytes() -> int | None:
    """Read the size of the address space; None where the kernel does not say, which is where it does not bound it either."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self, run: Callable[[Connection], None], name: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_preload))
        self._connection, theirs = context.Pipe()
        self._process: ForkServerProcess = context.Process(target=run, args=(theirs,), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, task: Any, cpu_s: float) -> bytes | None:
        """Its answer; None when the time was over. Raises WorkerEnded when it ends in another way, and RecursionError for a
        task that is nested too deeply to be sent."""
        asked = pickle.dumps((task, cpu_s))
        try:
            self._connection.send_bytes(asked)
            if self._connection.poll(SILENT_S):
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            self._process.join(SILENT_S)
        if self._process.exitcode == -signal.SIGPROF:
            return None
        raise WorkerEnded

    def kill(self) -> None:
        self._process.kill()


class Lane:
    """Workers of one kind that take turns, started when they are needed, and those who wait for them."""

    def __init__(self, size: int, run: Callable[[Connection], None], name: str, preload: Sequence[str] = ()) -> None:
        """``run`` calls :func:`run_worker`. ``preload`` has modules that workers should not have to import; they count until
        the first worker of any lane."""
        self._run, self._name = run, name
        _preload.extend(module for module in preload if module not in _preload)
        self._turns = asyncio.Semaphore(size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        self.waiting = 0
        """Tasks that wait or run."""

    async def warm(self) -> None:
        """Start a worker before it is needed."""
        async with self._turns:
            self._idle.append(await self._start())

    async def _start(self) -> _Worker:
        starting = asyncio.ensure_future(in_thread(_Worker, self._run, self._name))
        starting.add_done_callback(self._started)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda started: self._idle.append(started.result()))  # for the next
            raise

    def _started(self, starting: asyncio.Future[_Worker]) -> None:
        worker = starting.result()
        self._all.add(worker)
        if self._closed:
            self._discard(worker)

    async def ask(self, task: Any, cpu_s: float, turn_s: float | None = None) -> bytes | None:
        """Have a task done; returns the answer, None when it takes more than ``cpu_s`` of processor time. When this is
        cancelled the task ends.

        Raises TimeoutError where it has no turn within ``turn_s``, WorkerEnded, and RecursionError for a task that is nested
        too deeply to be sent.
        """
        self.waiting += 1
        try:
            await asyncio.wait_for(self._turns.acquire(), turn_s)
            try:
                return await self._asked(task, cpu_s)
            finally:
                self._turns.release()
        finally:
            self.waiting -= 1

    async def _asked(self, task: Any, cpu_s: float) -> bytes | None:
        worker = self._idle.pop() if self._idle else await self._start()
        try:
            answer = await in_thread(worker.ask, task, cpu_s)
        except RecursionError:
            self._idle.append(worker)
            raise
        except BaseException:
            self._discard(worker)
            raise
        if answer is None:
            self._discard(worker)
        else:
            self._idle.append(worker)
        return answer

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._all.discard(worker)

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._closed = True
        for worker in list(self._all):
            self._discard(worker)
