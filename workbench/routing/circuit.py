"""The circuit breaker of a worker: one that fails gets nothing for a while, and then one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

CircuitState = Literal["closed", "open", "half_open"]
STATES: tuple[CircuitState, ...] = ("closed", "open", "half_open")
"""In the order of their numbers in metrics."""


@dataclass
class Circuit:
    """Closed, everything goes through. After ``failures`` in a row it opens, and lets nothing through for ``open_s``
    seconds of ``clock``. Then it is half open: one request at a time is tried, and ``successes`` in a row close it, while a
    failure opens it again.

    What a request that began in an earlier state has come to says nothing about this one. None ``failures``: it never opens.
    """

    failures: int | None
    open_s: float
    successes: int
    clock: Callable[[], float]
    changed: Callable[[CircuitState], None] = lambda state: None
    """Told of every new state."""
    _state: CircuitState = "closed"
    _epoch: int = 0
    _in_a_row: int = 0
    """Failures while closed, successes while half open."""
    _opened_s: float = 0.0
    _trying: set[int] = field(default_factory=set)
    _begun: int = 0

    @property
    def state(self) -> CircuitState:
        if self._state == "open" and self.reopens_in_s <= 0:
            self._become("half_open")
        return self._state

    @property
    def reopens_in_s(self) -> float:
        """Seconds until an open one lets something through."""
        return self._opened_s + self.open_s - self.clock() if self._state == "open" else 0.0

    @property
    def lets_through(self) -> bool:
        """Whether a request may be sent now."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._trying)

    def begin(self) -> tuple[int, int]:
        """A request is sent. Returns what :meth:`end` wants."""
        self._begun += 1
        if self.state == "half_open":
            self._trying.add(self._begun)
        return self._epoch, self._begun

    def end(self, begun: tuple[int, int], well: bool | None) -> None:
        """A request has ended: well, not well, or (None) without telling anything about the worker."""
        epoch, number = begun
        self._trying.discard(number)
        if epoch != self._epoch or well is None:
            return
        if self._state == "closed":
            self._in_a_row = 0 if well else self._in_a_row + 1
            if self.failures is not None and self._in_a_row >= self.failures:
                self._open()
        elif not well:
            self._open()
        else:
            self._in_a_row += 1
            if self._in_a_row >= self.successes:
                self._become("closed")

    def _open(self) -> None:
        self._opened_s = self.clock()
        self._become("open")

    def _become(self, state: CircuitState) -> None:
        self._state = state
        self._epoch += 1
        self._in_a_row = 0
        self._trying.clear()
        self.changed(state)
