"""The process of one instance of a fleet: a server of its own, which says what it has to say to who started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

from workbench.fleet.planned import Planned
from workbench.serving.supervisor import serve

Guard = Callable[[Callable[[], int]], int]
"""Calls a function and returns its exit code, or that of an error, which it says in one line on stderr."""


def run_instance(planned: Planned, listener: socket.socket, out: Connection, errors: Connection, guard: Guard) -> None:
    """Run the process. Its first line on ``out`` is there when it serves; notes and errors go to ``errors``."""
    os.setpgid(0, 0)  # Ctrl-C is for who started it, and what it has started ends with it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _follow_parent()
    for stream, descriptor, pipe in ((sys.stdout, 1, out), (sys.stderr, 2, errors)):
        stream.flush()
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if planned.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = planned.gpus
    sys.exit(guard(partial(serve, planned.settings, listener=listener)))


def _follow_parent() -> None:
    """End with the process that has started this one, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
