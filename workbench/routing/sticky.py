"""Which workers a session goes to."""

from __future__ import annotations

from collections import OrderedDict

SESSIONS = 100_000
"""So many are remembered, the least recently used first out."""


class Sticky:
    """The workers of sessions by name: one each, or a pair."""

    def __init__(self) -> None:
        self._workers: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def workers(self, session: str | None) -> tuple[int, ...]:
        """The numbers of the workers that a session went to; none where it is new."""
        if session is None or session not in self._workers:
            return ()
        self._workers.move_to_end(session)
        return self._workers[session]

    def went(self, session: str | None, *workers: int) -> None:
        """A session has gone to these workers."""
        if session is None:
            return
        self._workers[session] = workers
        self._workers.move_to_end(session)
        while len(self._workers) > SESSIONS:
            self._workers.popitem(last=False)

    def forget(self, session: str | None) -> None:
        """A session is closed."""
        if session is not None:
            self._workers.pop(session, None)
