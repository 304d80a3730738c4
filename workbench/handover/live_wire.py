"""The wire of a live instance that prefills or decodes alone."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence

from workbench.handover import peer_messages as said
from workbench.handover.arrivals import Arrivals
from workbench.handover.departures import Departures
from workbench.handover.identity import Identity
from workbench.handover.kv_shares import KVMemory
from workbench.handover.peer import Peer
from workbench.handover.peer_link import LinkLost
from workbench.handover.wire_state import WireSettings, WireState
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    KVSent,
    Letter,
    Order,
    PagesSetAside,
    PeerGone,
    Room,
    SendPages,
    Shake,
    StopSending,
)


class LiveWire:
    """:class:`workbench.backend.Wire` over connections. Letters and pages go out from a thread for each peer, in order; what
    comes back, and what has become of orders, is there to :meth:`take`, and ``wake`` is called, from any thread.

    A connection that is lost, either way, is the end of everything shared with that peer (``PeerGone``): no page is written
    on its behalf from then on, and hands are shaken anew.
    """

    def __init__(
        self,
        identity: Identity,
        memory: KVMemory,
        listener: socket.socket,
        wake: Callable[[], None],
        settings: WireSettings,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``listener`` is bound and listens; ``say`` takes a line for whoever runs the instance."""
        self._state = WireState(identity, memory, wake, settings, say)
        self._departures = Departures(self._state)
        self._arrivals = Arrivals(self._state, listener, self.post)
        self.alarm_s = math.inf
        """When the scheduler is to be woken, on its clock."""
        self.on_first_pages: Callable[[str], None] = lambda request_id: None
        """Is told of requests whose first pages are posted."""
        self._to: dict[Room, Peer] = {}
        """Where pages of a handover go that is being sent."""
        threading.Thread(target=self._watch, name="peer-watch", daemon=True).start()

    @property
    def identity(self) -> Identity:
        return self._state.identity

    @property
    def address(self) -> str:
        return self.identity.address

    def number(self, address: str) -> int:
        """The number of a peer in letters."""
        return self._state.peer(address).number

    def room(self, router: str, number: int) -> Room:
        """The room of a handover by its name. Raises ValueError for one that is none."""
        return self._state.room(router, number)

    def post(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case Letter(to, message):
                    self._post_letter(self._state.peers[to - 1], order, message)
                case Shake(number):
                    peer = self._state.peers[number - 1]
                    if not peer.untold:
                        peer.gone = False
                        self._departures.put(peer, order)
                case SendPages(room=room, to=to):
                    self._to[room] = self._state.peers[to - 1]
                    if order.first:
                        self.on_first_pages(order.request_id)
                    self._departures.put(self._to[room], order)
                case StopSending(room):
                    if (sender := self._to.pop(room, None)) is not None:
                        sender.stop(room)  # before it is among the orders, where it may be reached at once
                        if not self._departures.put(sender, order):
                            sender.stop_reached(room)

    def _post_letter(self, peer: Peer, order: Letter, message: object) -> None:
        if isinstance(message, HandoverEnded):
            self._state.note_ended(message.room, message.finish)
        if isinstance(message, PagesSetAside):
            with peer.lock:
                if peer.untold:
                    return  # word of it is on its way to the scheduler, who frees these pages
                self._state.rooms.open(message.room, peer.number, message.pages)
        self._departures.put(peer, order)

    def wake_at(self, moment_s: float) -> None:
        self.alarm_s = moment_s

    def take(self) -> list[tuple[int, object]]:
        """What has come since the last call, in order, and from which peer; never waits."""
        found: list[tuple[int, object]] = []
        while self._state.mail:
            number, message = self._state.mail.popleft()
            if isinstance(message, PeerGone):
                self._state.peers[number - 1].untold -= 1
            elif isinstance(message, KVSent):
                self._to.pop(message.room, None)
            found.append((number, message))
        return found

    @property
    def has_mail(self) -> bool:
        return bool(self._state.mail)

    def accuse(self, number: int, why: str) -> None:
        """Have nothing to do any more with a peer that has said what cannot be."""
        self._state.lose(self._state.peers[number - 1], why)

    def close(self) -> None:
        """Take leave of all peers."""
        self._state.closing.set()
        self._arrivals.close()
        for peer in self._state.peers:
            if peer.thread is not None:
                peer.orders.put(None)
            with peer.lock:
                link, incoming, carrier = peer.link, peer.incoming, peer.carrier
            links = [one for one in (link, incoming) if one is not None]
            for one in links:
                one.limit(1.0)
                with contextlib.suppress(LinkLost):
                    one.send_if_free(said.encode(said.Bye()))
            for one in links:
                one.close()
            if carrier is not None:
                carrier.close()

    def _watch(self) -> None:
        limit_s = self._state.settings.timeout_s
        while not self._state.closing.wait(min(limit_s / 4, 1.0)):
            for peer in list(self._state.peers):
                with peer.lock:
                    link, incoming = peer.link, peer.incoming
                for one in (link, incoming):
                    if one is not None and time.monotonic() - one.heard_s > limit_s:
                        self._state.lose(peer, f"it has been silent for {limit_s:g} s", one)
                # Both sides say something by themselves: whoever sends pages says nothing else for long.
                for one, sign in ((link, said.Ping()), (incoming, said.Pong())):
                    if one is not None:
                        try:
                            one.send_if_free(said.encode(sign))
                        except LinkLost as lost:
                            self._state.lose(peer, str(lost), one)
