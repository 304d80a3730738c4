"""Long waits of a run in real time, said: a trace may have hours between two requests."""

from __future__ import annotations

import sys

LONG_S = 10.0
"""A shorter wait for the next request needs no word."""


class SaidWaits:
    """Notes on stderr, once a wait of one run, of how long it is until the next request."""

    def __init__(self) -> None:
        self._due_s = -1.0

    def __call__(self, due_s: float, now_s: float) -> None:
        """Nothing runs at ``now_s``, and the next request comes at ``due_s``."""
        if due_s != self._due_s and due_s - now_s >= LONG_S:
            self._due_s = due_s
            print(
                f"waiting: the next request comes in {spoken(due_s - now_s)}; Ctrl-C keeps what there is",
                file=sys.stderr,
            )


def spoken(seconds: float) -> str:
    """A duration as people say it, in its two largest units."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part) or "0 s"
