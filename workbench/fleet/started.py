"""An instance of a fleet, as who started it sees it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any

from workbench.fleet.instance_process import Guard, run_instance
from workbench.fleet.planned import LOOPBACK, Planned
from workbench.serving.child import how_it_ended
from workbench.serving.listening import listen

ERROR = "error: "


class FleetInstance:
    """A server in a process, and a process group, of its own. What it says on stderr goes to ours, behind its name; an
    error is kept for the line that names it when it has ended."""

    def __init__(self, planned: Planned, guard: Guard, served: Callable[[FleetInstance], None]) -> None:
        """Start it; ``served`` is told of it, from a thread, when it takes requests."""
        self.planned = planned
        self.announced = ""
        """What it said when it began to serve."""
        self._served = served
        self._error = ""
        self._buried = False
        listener = listen(LOOPBACK, 0)
        self.url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        spawn = multiprocessing.get_context("spawn")
        (out, their_out), (errors, their_errors) = spawn.Pipe(duplex=False), spawn.Pipe(duplex=False)
        self.process = spawn.Process(
            target=run_instance, args=(planned, listener, their_out, their_errors, guard), name=planned.name
        )
        self.process.start()
        listener.close()
        their_out.close()
        their_errors.close()
        threading.Thread(target=self._hear, args=(_lines(out),), daemon=True).start()
        self._relay = threading.Thread(target=self._pass_on, args=(_lines(errors),), daemon=True)
        self._relay.start()

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def end(self) -> None:
        """Tell it to finish what it has and to end."""
        self._send(signal.SIGTERM)

    def end_at_once(self) -> None:
        """Tell it not to finish anything: a second signal does."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._send(number)

    def kill(self) -> None:
        """End it with all that it has started. Once it has ended, the next time is nothing: its number may be another's."""
        if self._buried or self.process.pid is None:
            return
        self._buried = not self.process.is_alive()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._send(signal.SIGKILL)  # it may have had no group of its own yet

    def _send(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, number)

    def how_it_ended(self) -> str:
        """Say in words how it has ended, and why where it has said so."""
        self.process.join()
        self._relay.join(timeout=1)  # what it has said is on its way
        return self._error or how_it_ended(self.process.exitcode)

    def _hear(self, lines: IO[str]) -> None:
        for line in lines:
            if not self.announced:
                self.announced = line.rstrip("\n")
                self._served(self)

    def _pass_on(self, lines: IO[str]) -> None:
        for line in lines:
            if line.startswith(ERROR):
                self._error = line.removeprefix(ERROR).rstrip("\n")
            else:
                print(f"{self.name}: {line}", end="", file=sys.stderr, flush=True)


def _lines(pipe: Connection) -> IO[str]:
    found: Any = os.fdopen(os.dup(pipe.fileno()), encoding="utf-8", errors="replace")
    pipe.close()
    return found  # type: ignore[no-any-return]
