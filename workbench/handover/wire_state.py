"""What the parts of a wire share: peers by name, the mail that has come from them, and what ends with each."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from workbench.handover.addresses import is_here
from workbench.handover.carrier_names import CarrierName
from workbench.handover.handshake import Refused
from workbench.handover.identity import Identity
from workbench.handover.kv_shares import KVMemory
from workbench.handover.peer import Peer
from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.peer_messages import RoomName
from workbench.handover.rooms import Rooms
from workbench.scheduler.disaggregated.letters import PeerGone, Room
from workbench.scheduler.request import Finish

HERE = 0
"""Number of an instance in its own letters; those of peers begin at 1."""
NUMBER_BITS = 56
"""Of a handover's number at its router."""
REMEMBERED = 1 << 16
"""Handovers that ended here, of which a peer that has not heard is told again."""
MOST_LINE = 500
"""Characters of a line about a peer, who may have made it up."""
SAID_AGAIN_S = 10.0
"""How long a line is not repeated."""


@dataclass(frozen=True)
class WireSettings:
    """Settings of a wire."""

    key: bytes = b""
    carrier: CarrierName = "auto"
    timeout_s: float = 15.0
    """How long a peer may be silent."""
    loopback_only: bool = False
    """Whether peers elsewhere are refused: where there is no key."""


class WireState:
    """Peers, rooms and mail of one instance. Its methods may be called from any thread."""

    def __init__(
        self,
        identity: Identity,
        memory: KVMemory,
        wake: Callable[[], None],
        settings: WireSettings,
        say: Callable[[str], None] | None,
    ) -> None:
        self.identity, self.memory, self.settings = identity, memory, settings
        self._wake = wake
        self._tell = say or _tell
        self.mail: deque[tuple[int, object]] = deque()
        """What has come, and from which peer."""
        self.peers: list[Peer] = []
        self._by_address: dict[str, Peer] = {}
        self._naming = threading.Lock()
        self.rooms = Rooms(memory)
        self._ended: OrderedDict[Room, Finish] = OrderedDict()
        self._lines: dict[str, float] = {}
        self.closing = threading.Event()

    # -- names --------------------------------------------------------------------------------------------------------------

    def peer(self, address: str) -> Peer:
        """The peer of an address."""
        with self._naming:
            peer = self._by_address.get(address)
            if peer is None:
                peer = Peer(len(self.peers) + 1, address)
                self.peers.append(peer)
                self._by_address[address] = peer
            return peer

    def room(self, router: str, number: int, again: int = 0) -> Room:
        """The room of a handover by its name. Raises ValueError for one that is none."""
        if not (0 <= number < 1 << NUMBER_BITS and 0 <= again < 1 << 31 and 0 < len(router) <= 200):
            raise ValueError("not the name of a handover")
        # The router's name as a number, behind a 1 that keeps its first zeros: no table of them has to be kept.
        return int.from_bytes(b"\1" + router.encode(), "big") << NUMBER_BITS | number, again

    def name(self, room: Room) -> RoomName:
        """The name of a room, which peers know, too."""
        number, again = room
        router = number >> NUMBER_BITS
        name = router.to_bytes((router.bit_length() + 7) // 8, "big")[1:].decode()
        return name, number & ((1 << NUMBER_BITS) - 1), again

    def room_of(self, name: RoomName) -> Room:
        """The room that a peer has named. Raises LinkLost."""
        try:
            return self.room(*name)
        except ValueError as error:
            raise LinkLost(f"it named a handover that cannot be: {error}") from None

    def check_reach(self, address: str) -> None:
        """Raise Refused for a peer that is elsewhere, where all have to be here."""
        if self.settings.loopback_only and not is_here(address):
            raise Refused("without --peer-key, peers are on this machine")

    # -- handovers that have ended here -------------------------------------------------------------------------------------

    def note_ended(self, room: Room, finish: Finish) -> None:
        """A peer is told that a handover has ended here; it may not hear."""
        self._ended[room] = finish
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def ended(self, room: Room) -> Finish | None:
        """Return how a handover ended here, if it did."""
        return self._ended.get(room)

    # -- mail ---------------------------------------------------------------------------------------------------------------

    def put_mail(self, peer: Peer, message: object) -> None:
        """Have the scheduler told of something."""
        self.mail.append((peer.number, message))
        self._wake()

    def say(self, line: str) -> None:
        """Tell whoever runs the instance, unless it has just been said."""
        line = "".join(c if c.isprintable() else " " for c in line[:MOST_LINE])
        now_s = time.monotonic()
        if now_s - self._lines.get(line, -math.inf) > SAID_AGAIN_S:
            if len(self._lines) > 1000:
                self._lines.clear()
            self._lines[line] = now_s
            self._tell(line)

    # -- the end of a peer --------------------------------------------------------------------------------------------------

    def lose(self, peer: Peer, why: str, link: Link | None = None, last_word: bytes | None = None) -> None:
        """A connection of a peer is lost, or all are (None): so is everything that is shared with it. ``why`` is empty where
        it ended in order; ``last_word`` goes to the peer, if it can."""
        with peer.lock:
            if link is not None and link not in (peer.link, peer.incoming):
                return  # it is known
            links, carrier = [one for one in (peer.link, peer.incoming) if one is not None], peer.carrier
            peer.link = peer.incoming = peer.carrier = None
            peer.instance_id = ""
            peer.delivered.clear()
            peer.gone = True
            peer.losses += 1
            peer.untold += 1
        if link is not None and last_word is not None:
            with contextlib.suppress(LinkLost):
                link.limit(1.0)
                link.send_if_free(last_word)
        for one in links:
            one.close()
        if carrier is not None:
            carrier.close()
        with peer.writing:  # whoever writes is done first, and nobody does any more
            self.rooms.close_all(peer.number)
        if self.closing.is_set():
            return
        if why:
            self.say(f"peer {peer.address}: {why}")
        self.put_mail(peer, PeerGone(peer.number))


def _tell(line: str) -> None:
    """Tell whoever runs the instance, by one write, so that no other thread's line gets between it and its end."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
