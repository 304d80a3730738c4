"""One peer of an instance: what goes out to it, in order, from a thread of its own."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue

from workbench.handover.carriers import Outgoing
from workbench.handover.peer_link import Link
from workbench.scheduler.disaggregated.letters import Order, Room


@dataclass(eq=False)
class Peer:
    """Another instance, by the address that it goes by. ``number`` is its name in letters here."""

    number: int
    address: str
    orders: SimpleQueue[tuple[int, Order] | None] = field(default_factory=SimpleQueue)
    """With how often it had been lost by then; None: the end."""
    losses: int = 0
    thread: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of the links below."""
    link: Link | None = None
    """The connection that this side made: letters and pages go out over it, answers come back."""
    carrier: Outgoing | None = None
    incoming: Link | None = None
    """The connection that the other side made."""
    instance_id: str = ""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Held while its pages are checked and written."""
    gone: bool = False
    """It was lost: what is posted to it is dropped until somebody shakes hands again."""
    untold: int = 0
    """How often it was lost since the scheduler was last told: what that posts belongs to what was."""
    sent: dict[Room, int] = field(default_factory=dict)
    """Pages sent of each handover. Of the thread alone."""
    delivered: set[Room] = field(default_factory=set)
    """Handovers of which all was sent and that the other side has not acknowledged."""
    _stops: dict[Room, int] = field(default_factory=dict)
    """How many orders to send no more of a handover are still among :attr:`orders`."""

    def stop(self, room: Room) -> None:
        """Nothing that is ordered already of a handover is to be sent."""
        with self.lock:
            self._stops[room] = self._stops.get(room, 0) + 1

    def stop_reached(self, room: Room) -> None:
        """What comes of a handover now was ordered after it had been stopped."""
        with self.lock:
            if self._stops.get(room, 0) > 1:
                self._stops[room] -= 1
            else:
                self._stops.pop(room, None)

    def stopped(self, room: Room) -> bool:
        return room in self._stops
