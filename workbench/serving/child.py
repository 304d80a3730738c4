"""The common start of a server's child processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def how_it_ended(exitcode: int | None) -> str:
    """Say in words how a process has ended that has said nothing itself."""
    code = exitcode or 0
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def begin_child() -> None:
    """Make this process a child of the server: the parent sees to signals, and no child outlives it. To be called first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a child of the server is started by it"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
