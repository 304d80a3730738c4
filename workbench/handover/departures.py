"""What goes out to peers: letters and pages, in order, from a thread for each of them."""

from __future__ import annotations

import threading
from queue import Empty

import numpy as np

from workbench.handover import peer_messages as said
from workbench.handover.carriers import BLOCK_BYTES, Outgoing, TcpOutgoing
from workbench.handover.handshake import Refused, connect, introduce
from workbench.handover.peer import Peer
from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.shared_memory import ShmOutgoing
from workbench.handover.wire_state import WireState
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    HandsShaken,
    KVSent,
    Letter,
    Order,
    PagesSetAside,
    SendPages,
    Shake,
    StopSending,
    Withdrawn,
)
from workbench.scheduler.messages import Generate

IDLE_S = 30.0
"""How long a thread waits for something to send to a peer that is gone."""


class Departures:
    """The connections that this side makes, and what it says there."""

    def __init__(self, state: WireState) -> None:
        self._state = state

    def put(self, peer: Peer, order: Order) -> bool:
        """Have an order followed; tells whether anybody is there to follow it for."""
        if peer.gone or peer.untold:
            return False
        with peer.lock:
            peer.orders.put((peer.losses, order))
            if peer.thread is None:
                peer.thread = threading.Thread(
                    target=self._send_all, args=(peer,), name=f"to {peer.address[:80]}", daemon=True
                )
                peer.thread.start()
        return True

    def _send_all(self, peer: Peer) -> None:
        while (entry := self._next(peer)) is not None:
            losses, order = entry
            if isinstance(order, StopSending):
                peer.stop_reached(order.room)
                peer.sent.pop(order.room, None)
                continue
            if losses != peer.losses or peer.gone or peer.untold:
                continue  # it belongs to what was
            link = peer.link
            try:
                link = link or self._connect(peer)
                if link is not None:
                    self._send(peer, link, order)
            except (Refused, LinkLost) as lost:
                self._state.lose(peer, str(lost), link)
            except Exception as error:  # of the memory, which may end before its instance does
                self._state.lose(peer, f"KV for it cannot be read: {type(error).__name__}: {error}", link)

    def _next(self, peer: Peer) -> tuple[int, Order] | None:
        """The next order for a peer; None: the thread that asks is needed no more."""
        while True:
            try:
                return peer.orders.get(timeout=IDLE_S)
            except Empty:
                with peer.lock:
                    if peer.link is None and peer.orders.empty():
                        peer.thread = None
                        return None

    def _send(self, peer: Peer, link: Link, order: Order) -> None:
        match order:
            case Shake(number):
                with peer.lock:  # if it was lost since, word of that comes alone
                    if peer.link is link:
                        self._state.put_mail(peer, HandsShaken(number))
            case SendPages():
                self._send_pages(peer, link, order)
            case Letter(_, message):
                link.send(said.encode(self._written(message)))

    def _written(self, message: object) -> said.Said:
        match message:
            case PagesSetAside(room, request_id, cached_tokens, pages):
                return said.SetAside(
                    self._state.name(room), request_id, cached_tokens, pages.astype(np.int32).tobytes()
                )
            case Withdrawn(room):
                return said.Withdraw(self._state.name(room))
            case HandoverEnded(room, finish):
                return said.Ended(self._state.name(room), finish.kind, finish.detail)
            case Generate(rid=rid, prompt=tokens, params=params, pair=pair):
                assert pair is not None
                data = tokens.astype(np.int32).tobytes()
                more = message.written_tokens, params, message.priority, message.namespace
                return said.Prefill(self._state.name(pair.room), rid, data, *more)
        raise TypeError(f"a letter of type {type(message).__name__} goes to no peer")

    def _send_pages(self, peer: Peer, link: Link, order: SendPages) -> None:
        room, carrier, memory = order.room, peer.carrier, self._state.memory
        assert carrier is not None
        if len(order.pages) != len(order.target_pages):
            raise LinkLost(
                f"it set aside {len(order.target_pages)} pages where a prompt goes on for {len(order.pages)}"
            )
        name = self._state.name(room)
        if order.first:
            peer.sent[room] = 0
            link.send(said.encode(said.Again(name)))
        first = peer.sent.get(room, 0)
        step = self._pages_at_a_time()
        for at in range(0, len(order.pages), step):
            pages, target = order.pages[at : at + step], order.target_pages[at : at + step].astype(np.int32)
            for box in memory.sources:
                if peer.stopped(room):
                    return
                data = memory.read(box, pages)
                block = said.Block(name, (*box,), first + at, target.tobytes(), data.nbytes)
                carrier.send(link, block, data)
        peer.sent[room] = first + len(order.pages)
        if order.last and not peer.stopped(room):
            peer.sent.pop(room, None)
            peer.delivered.add(room)
            link.send(said.encode(said.Sent(name, order.token, order.cached_tokens, order.logprobs)))

    def _pages_at_a_time(self) -> int:
        shape = self._state.memory.shape
        return max(BLOCK_BYTES // max(shape.block_bytes(box, 1) for box in self._state.memory.sources), 1)

    def _connect(self, peer: Peer) -> Link | None:
        """Shake hands with a peer. None: it was lost meanwhile, the other way round. Raises Refused or LinkLost."""
        self._state.check_reach(peer.address)
        link = connect(peer.address)
        offered = self._carriers()
        chosen: Outgoing | None = None
        try:
            other, name = introduce(
                link,
                self._state.settings.key,
                self._state.identity,
                {each.name: each.offer() for each in offered},
            )
            chosen = next((each for each in offered if each.name == name), None)
            if chosen is None:
                raise Refused(f"it takes KV no way that is offered ({', '.join(each.name for each in offered)})")
        except BaseException:
            link.close()
            raise
        finally:
            for each in offered:
                each.close() if each is not chosen else each.begin()
        with peer.lock:
            if peer.incoming is not None and peer.instance_id not in ("", other.instance_id):
                link.close()
                raise LinkLost("it is another instance than before")
            if peer.gone or peer.untold:
                link.close()
                chosen.close()
                return None
            peer.link, peer.carrier, peer.instance_id = link, chosen, other.instance_id
        threading.Thread(target=self._read_answers, args=(peer, link), name=f"from {peer.address}", daemon=True).start()
        return link

    def _carriers(self) -> list[Outgoing]:
        """The ways to offer, the best first."""
        asked = self._state.settings.carrier
        found: list[Outgoing] = []
        if asked in ("auto", "shm"):
            step = self._pages_at_a_time()
            try:
                found.append(
                    ShmOutgoing(
                        max(self._state.memory.shape.block_bytes(box, step) for box in self._state.memory.sources)
                    )
                )
            except OSError as error:
                if asked == "shm":
                    raise Refused(f"no shared memory: {error.strerror or error}") from None
        if asked in ("auto", "tcp"):
            found.append(TcpOutgoing())
        return found

    def _read_answers(self, peer: Peer, link: Link) -> None:
        try:
            while True:
                match link.receive(said.answer_decoder):
                    case said.Received(name):
                        room = self._state.room_of(name)
                        if room not in peer.delivered:
                            raise LinkLost("it says that it has a handover that was not sent to its end")
                        peer.delivered.discard(room)
                        self._state.put_mail(peer, KVSent(room))
                    case said.Taken(place):
                        carrier = peer.carrier
                        if carrier is not None:
                            carrier.freed(place)
                    case said.Bye():
                        self._state.lose(peer, "", link)
                        return
                    case said.Fault(line):
                        raise LinkLost(f"it says: {line[:300]}")
        except LinkLost as lost:
            self._state.lose(peer, str(lost), link)
