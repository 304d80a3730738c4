"""Links that carry KV between instances, shared by the transfers of a moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf

import simpy

from backends.simulated.clock import Clock


@dataclass(frozen=True)
class Port:
    """What one instance can send at a time, and receive at the same time."""

    bytes_s: float
    latency_s: float
    """Of what it sends: from the last byte leaving to word of it at either end."""


@dataclass(slots=True, eq=False)
class _Piece:
    size_bytes: float
    left: Callable[[], None]


@dataclass(slots=True, eq=False)
class _Transfer:
    """Pieces of one handover, one behind the other."""

    source: int
    target: int
    pieces: deque[_Piece] = field(default_factory=deque)
    left_bytes: float = 0.0
    """Of the first piece."""
    bytes_s: float = 0.0
    end_s: float = inf
    """Of the first piece, at that rate."""


class KVNetwork:
    """Transfers between ports, in the time of a simulated clock.

    Each port sends to, and receives from, everybody at the same time, and divides what it has fairly: a transfer gets as
    much as the others at the port where it gets least, and what it cannot use elsewhere is theirs (max-min fairness).
    Pieces of one transfer go one behind the other. Whenever a transfer begins or ends all rates are worked out afresh.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ports: dict[int, Port] = {}
        self._transfers: dict[Hashable, _Transfer] = {}
        """Those that have something to send, in the order in which they began."""
        self._since_s = 0.0
        """When rates were worked out last."""
        self._timer: simpy.Event | None = None

    def connect(self, instance: int, port: Port) -> None:
        """Give an instance its port."""
        self._ports[instance] = port

    def latency_s(self, source: int) -> float:
        """Return what a message from an instance takes."""
        return self._ports[source].latency_s

    def send(self, key: Hashable, source: int, target: int, size_bytes: float, left: Callable[[], None]) -> None:
        """Begin to send a piece, behind those of the same key before; ``left`` is called when its last byte has gone, unless
        it is stopped before."""
        self._progress()
        transfer = self._transfers.get(key)
        if transfer is None:
            transfer = self._transfers[key] = _Transfer(source, target)
            transfer.left_bytes = size_bytes
        transfer.pieces.append(_Piece(size_bytes, left))
        self._share()

    def stop(self, key: Hashable) -> None:
        """Send nothing more of a key."""
        self._progress()
        if self._transfers.pop(key, None) is not None:
            self._share()

    def stop_all(self, instance: int) -> None:
        """Send nothing more from or to an instance."""
        self._progress()
        for key in [key for key, one in self._transfers.items() if instance in (one.source, one.target)]:
            del self._transfers[key]
        self._share()

    def _progress(self) -> None:
        """Bring what is left of every transfer up to now."""
        now_s = self._clock.now_s()
        passed_s, self._since_s = now_s - self._since_s, now_s
        for transfer in self._transfers.values():
            if passed_s > 0:
                transfer.left_bytes = max(transfer.left_bytes - transfer.bytes_s * passed_s, 0.0)

    def _share(self) -> None:
        """Work out all rates, and wait for the first piece to end."""
        self._fair_rates()
        now_s, first_s = self._since_s, inf
        for transfer in self._transfers.values():
            transfer.end_s = now_s + transfer.left_bytes / transfer.bytes_s
            first_s = min(first_s, transfer.end_s)
        if self._timer is not None:
            self._clock.cancel(self._timer)
            self._timer = None
        if first_s < inf:
            self._timer = self._clock.call_at(first_s, self._end_pieces)

    def _fair_rates(self) -> None:
        """Fill all transfers alike until a port is full; those through it stay, the others go on."""
        left: dict[tuple[str, int], float] = {}
        through: dict[tuple[str, int], list[_Transfer]] = {}
        for transfer in self._transfers.values():
            for end in (("out", transfer.source), ("in", transfer.target)):
                left.setdefault(end, self._ports[end[1]].bytes_s)
                through.setdefault(end, []).append(transfer)
        while through:
            fullest = min(through, key=lambda end: left[end] / len(through[end]))
            rate = left[fullest] / len(through[fullest])
            for transfer in through.pop(fullest):
                transfer.bytes_s = rate
                for end in (("out", transfer.source), ("in", transfer.target)):
                    if end in through:
                        through[end].remove(transfer)
                        left[end] -= rate if left[end] < inf else 0.0
                        if not through[end]:
                            del through[end]

    def _end_pieces(self) -> None:
        """The first piece of some transfers has left."""
        self._timer = None
        now_s = self._clock.now_s()
        ended = [(key, transfer) for key, transfer in self._transfers.items() if transfer.end_s <= now_s]
        self._progress()
        for key, transfer in ended:
            piece = transfer.pieces.popleft()
            if transfer.pieces:
                transfer.left_bytes = transfer.pieces[0].size_bytes
            else:
                del self._transfers[key]
            piece.left()
        self._share()
