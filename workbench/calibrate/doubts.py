"""What speaks against a measurement: others that use the machine, and a fit that is far from what was measured."""

from __future__ import annotations

import time

BUSY = 0.1
"""From such a share of waiting on, others use the machine so much that it is said."""
FAR = 0.25
"""From such a mean error on, a fit says little."""


def waiting_share(seconds: float = 0.05) -> float:
    """The share of its time that a busy loop waits for a core now: others use the machine."""
    began_s, spent_s = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began_s < seconds:
        pass
    return max(1 - (time.thread_time() - spent_s) / (time.perf_counter() - began_s), 0.0)


def doubts(busy: float | None, mean_error: float, holds: str = "") -> list[str]:
    """Say what to know of a measurement during which a process waited for a core for a share ``busy`` of its time (None: not
    known), and whose fit is off by ``mean_error``. ``holds``: what others do not change, if there is anything."""
    said = []
    if busy is not None and busy > BUSY:
        told = holds or "Times are longer for it, and scatter; measure again with --force when it is quiet"
        said.append(f"others used this machine: {busy:.0%} of its time a process waited for a core. {told}")
    if mean_error > FAR:
        said.append(
            f"off by {mean_error:.0%} on average is far: what was measured scatters, or is of another form than the fit; "
            "predictions will be no nearer"
        )
    return said
