"""What comes from peers: connections that they make, and what they say there, checked before anything is done about it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from workbench.handover import peer_messages as said
from workbench.handover.carriers import Incoming, TcpIncoming
from workbench.handover.handshake import Refused, accept
from workbench.handover.identity import Identity
from workbench.handover.peer import Peer
from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.shared_memory import ShmIncoming
from workbench.handover.wire_state import HERE, WireState
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    KVArrived,
    Letter,
    Order,
    PagesSetAside,
    Room,
    TokenLogprobs,
    Withdrawn,
)
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Pair

MOST_STRANGERS = 64
"""Connections at a time that have not shaken hands yet: the oldest makes way for the next, so that whoever says nothing
holds up nobody."""


class Arrivals:
    """The connections that the other side makes, each with a thread that reads it. ``post`` follows orders."""

    def __init__(self, state: WireState, listener: socket.socket, post: Callable[[Sequence[Order]], None]) -> None:
        self._state, self._listener, self._post = state, listener, post
        self._strangers: OrderedDict[Link, None] = OrderedDict()
        self._lock = threading.Lock()
        """Of the strangers."""
        threading.Thread(target=self._accept_all, name="peers", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a close alone wakes nobody who waits there
        self._listener.close()
        with self._lock:
            strangers = list(self._strangers)
        for link in strangers:
            link.close()

    def _accept_all(self) -> None:
        for number in count():
            try:
                connection, origin = self._listener.accept()
            except OSError:
                if self._state.closing.is_set():
                    return
                time.sleep(0.1)  # out of files, say: it may pass
                continue
            link = Link(connection)
            with self._lock:
                oldest = self._strangers.popitem(last=False)[0] if len(self._strangers) == MOST_STRANGERS else None
                self._strangers[link] = None
            if oldest is not None:
                oldest.close()
            threading.Thread(target=self._shake, args=(link, origin[0]), name=f"peer-{number}", daemon=True).start()

    def _shake(self, link: Link, origin: str) -> None:
        carriers: dict[str, Incoming] = {}
        why = ""
        try:
            other, chosen = accept(
                link,
                self._state.settings.key,
                self._state.identity,
                lambda offers: self._choose(offers, carriers),
            )
            self._state.check_reach(other.address)
        except (Refused, LinkLost) as error:
            why = str(error)
        with self._lock:
            if self._strangers.pop(link, link) is not None:
                why = f"{MOST_STRANGERS} others came while it did not shake hands"
        if why:
            link.close()
            for carrier in carriers.values():
                carrier.close()
            if not self._state.closing.is_set():
                self._state.say(f"peer: a connection from {origin} was refused: {why}")
            return
        peer = self._state.peer(other.address)
        while not self._takes(peer, link, other):
            self._state.lose(peer, "it has begun anew")
        if self._state.closing.is_set():
            link.close()
        self._read(peer, link, carriers[chosen])

    def _takes(self, peer: Peer, link: Link, other: Identity) -> bool:
        """Have a connection be a peer's, unless it has one already, or is somebody else's by that name."""
        with peer.lock:
            if peer.incoming is not None or (peer.link is not None and peer.instance_id not in ("", other.instance_id)):
                return False
            peer.incoming, peer.instance_id = link, other.instance_id
            peer.gone = False
            return True

    def _choose(self, offers: dict[str, bytes], made: dict[str, Incoming]) -> str:
        """Pick a way for KV to come, of those that are offered; empty: none will do."""
        asked = self._state.settings.carrier
        if "shm" in offers and asked in ("auto", "shm"):
            try:
                made["shm"] = ShmIncoming(offers["shm"])
                return "shm"
            except (OSError, ValueError):
                pass  # another machine, or another user
        if "tcp" in offers and asked in ("auto", "tcp"):
            made["tcp"] = TcpIncoming()
            return "tcp"
        return ""

    def _read(self, peer: Peer, link: Link, carrier: Incoming) -> None:
        role = self._state.identity.role
        decodes = role == "decode"
        try:
            while True:
                match link.receive(said.said_decoder):
                    case said.Ping():
                        pass
                    case said.Bye():
                        self._state.lose(peer, "", link)
                        return
                    case said.SetAside(name, request_id, cached_tokens, pages) if not decodes:
                        self._set_aside(peer, self._state.room_of(name), request_id, cached_tokens, pages)
                    case said.Prefill() as again if not decodes:
                        self._state.put_mail(peer, self._again(peer, again))
                    case said.Withdraw(name) if not decodes:
                        self._state.put_mail(peer, Withdrawn(self._state.room_of(name)))
                    case said.Block() as block if decodes:
                        self._take_block(peer, link, carrier, block)
                    case said.Again(name) if decodes:
                        with peer.writing:
                            self._check_current(peer, link)
                            self._state.rooms.begin_again(self._state.room_of(name), peer.number)
                    case said.Sent() as sent if decodes:
                        self._complete(peer, link, sent)
                    case said.Ended(name, kind, detail) if decodes:
                        self._handover_ended(peer, link, self._state.room_of(name), kind, detail)
                    case message:
                        raise LinkLost(f"it sent a {type(message).__name__} to an instance that is there to {role}")
        except LinkLost as lost:
            self._state.lose(peer, str(lost), link, said.encode(said.Fault(str(lost))))
        except Exception as error:  # of the memory, which may end before its instance does
            self._state.lose(peer, f"KV of it cannot be written: {type(error).__name__}: {error}", link)
        finally:
            link.close()
            carrier.close()

    def _set_aside(self, peer: Peer, room: Room, request_id: str, cached_tokens: int, pages: bytes) -> None:
        if len(pages) % 4 or cached_tokens < 0:
            raise LinkLost("it set aside what are no pages")
        if (finish := self._state.ended(room)) is not None:
            self._post([Letter(peer.number, HandoverEnded(room, finish))])
            return
        self._state.put_mail(peer, PagesSetAside(room, request_id[:200], cached_tokens, np.frombuffer(pages, np.int32)))

    def _again(self, peer: Peer, again: said.Prefill) -> Generate:
        """A request of a peer that has lost its KV there."""
        room = self._state.room_of(again.room)
        if not room[1] or len(again.tokens) % 4 or not 0 <= again.written_tokens < len(again.tokens) // 4:
            raise LinkLost("it asked for a prompt again that cannot be")
        return Generate(
            f"{again.request_id[:300]}~{room[1]}",  # beside the first one, which may not have ended here
            np.frombuffer(again.tokens, np.int32),
            again.params,
            priority=again.priority,
            namespace=again.namespace,
            pair=Pair(room, peer.number, HERE),
            written_tokens=again.written_tokens,
        )

    def _take_block(self, peer: Peer, link: Link, carrier: Incoming, block: said.Block) -> None:
        room = self._state.room_of(block.room)
        with peer.writing:
            self._state.rooms.check(room, peer.number, block)
        data = carrier.take(link, block)
        self._state.rooms.await_turn(room, peer.number)
        with peer.writing:
            self._check_current(peer, link)
            self._state.rooms.write(room, peer.number, block, data)
        if carrier.answers:
            link.send(said.encode(said.Taken(block.place)))

    def _complete(self, peer: Peer, link: Link, sent: said.Sent) -> None:
        room = self._state.room_of(sent.room)
        with peer.writing:
            self._check_current(peer, link)
            logprobs = None if sent.logprobs is None else TokenLogprobs(*sent.logprobs)
            self._state.rooms.complete(room, peer.number)
            self._state.put_mail(peer, KVArrived(room, sent.token, max(sent.cached_tokens, 0), logprobs))
        link.send(said.encode(said.Received(sent.room)))

    def _handover_ended(self, peer: Peer, link: Link, room: Room, kind: str, detail: str) -> None:
        if kind not in ("aborted", "rejected"):
            raise LinkLost(f"it ended a handover as {kind[:40]!r}")
        with peer.writing:
            self._check_current(peer, link)
            self._state.rooms.close(room, peer.number)
            self._state.put_mail(peer, HandoverEnded(room, Finish(kind, detail[:100])))  # type: ignore[arg-type]

    def _check_current(self, peer: Peer, link: Link) -> None:
        if peer.incoming is not link:
            raise LinkLost("the connection is at an end")
