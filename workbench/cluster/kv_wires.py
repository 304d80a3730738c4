"""The wires of simulated instances: letters with a latency, and KV over links that transfers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import simpy

from backends.simulated.clock import Clock
from backends.simulated.kv_layout import KVOnTheWire
from backends.simulated.kv_network import KVNetwork, Port
from workbench.scheduler.disaggregated.letters import (
    HandsShaken,
    KVArrived,
    KVSent,
    Letter,
    Order,
    PeerGone,
    SendPages,
    Shake,
    StopSending,
    TimeIsUp,
)


class _Inbox(Protocol):
    def put(self, message: object) -> None: ...


class Transfers(Protocol):
    """Is told of transfers, for the record."""

    def transfer_started(self, request_id: str) -> None: ...

    def transfer_ended(self, request_id: str) -> None: ...


class SimulatedWires:
    """The wires between the instances of one world."""

    def __init__(self, clock: Clock, inboxes: Sequence[_Inbox], told: Transfers) -> None:
        self.clock = clock
        self.inboxes = inboxes
        self.told = told
        self.network = KVNetwork(clock)
        self.gone: set[int] = set()
        """Instances that take nothing in and send nothing."""

    def wire(
        self, instance: int, port: Port, page_size: int, kv_to: Callable[[int], KVOnTheWire], now_s: Callable[[], float]
    ) -> SimulatedWire:
        """The wire of an instance. ``kv_to`` says what its KV is for another one; ``now_s`` is its CPU's clock."""
        self.network.connect(instance, port)
        return SimulatedWire(self, instance, page_size, kv_to, now_s)

    def cut(self, instance: int) -> None:
        """An instance is gone: nothing comes from it or gets there any more, and the others get word once all that has left
        it has arrived."""
        self.gone.add(instance)
        self.network.stop_all(instance)
        for other in range(len(self.inboxes)):
            if other != instance:
                self.clock.after(self.network.latency_s(instance), partial(self.deliver, other, PeerGone(instance)))

    def mend(self, instance: int) -> None:
        """An instance is there again, and knows nothing of what was."""
        self.gone.discard(instance)

    def deliver(self, to: int, message: object) -> None:
        """Put a message into an inbox now."""
        if to not in self.gone:
            self.inboxes[to].put(message)


class SimulatedWire:
    """:class:`workbench.backend.Wire` of one instance."""

    def __init__(
        self,
        wires: SimulatedWires,
        instance: int,
        page_size: int,
        kv_to: Callable[[int], KVOnTheWire],
        now_s: Callable[[], float],
    ) -> None:
        self._wires = wires
        self._instance = instance
        self._page_size = page_size
        self._kv_to = kv_to
        self._now_s = now_s
        self._alarm: simpy.Event | None = None

    def post(self, orders: Sequence[Order]) -> None:
        if not orders:
            return
        clock, network = self._wires.clock, self._wires.network
        debt_s = self._now_s() - clock.now_s()
        latency_s = network.latency_s(self._instance)
        for order in orders:
            match order:
                case Letter(to, message):
                    clock.after(debt_s + latency_s, partial(self._wires.deliver, to, message))
                case Shake(peer):
                    back_s = debt_s + latency_s + network.latency_s(peer)
                    clock.after(back_s, partial(self._wires.deliver, self._instance, HandsShaken(peer)))
                case SendPages():
                    clock.after(debt_s, partial(self._send, order))
                case StopSending(room):
                    clock.after(debt_s, partial(network.stop, room))

    def wake_at(self, moment_s: float) -> None:
        clock = self._wires.clock
        if self._alarm is not None and not self._alarm.processed:
            clock.cancel(self._alarm)
        self._alarm = None
        if moment_s < float("inf"):
            delay_s = moment_s - clock.now_s()
            self._alarm = clock.after(delay_s, lambda: self._wires.deliver(self._instance, TimeIsUp()))

    def _send(self, order: SendPages) -> None:
        if self._wires.gone & {self._instance, order.to}:
            return
        kv = self._kv_to(order.to)
        size_bytes = kv.pages_bytes(len(order.pages), self._page_size)
        if order.last:
            size_bytes += kv.rest_bytes(order.tokens)
        if order.first:
            self._wires.told.transfer_started(order.request_id)
        self._wires.network.send(order.room, self._instance, order.to, size_bytes, partial(self._left, order))

    def _left(self, order: SendPages) -> None:
        """The last byte of these pages is on its way."""
        wires = self._wires
        wires.clock.after(wires.network.latency_s(self._instance), partial(self._arrived, order))

    def _arrived(self, order: SendPages) -> None:
        """Pages are there; with the last of a request both sides get word."""
        if not order.last:
            return
        self._wires.told.transfer_ended(order.request_id)
        self._wires.deliver(order.to, KVArrived(order.room, order.token, order.cached_tokens))
        self._wires.deliver(self._instance, KVSent(order.room))
