"""The wire of a live instance that prefills or decodes alone."""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from workbench.handover import peer_messages as said
from workbench.handover.addresses import is_loopback, split_address
from workbench.handover.carrier_names import CarrierName
from workbench.handover.carriers import BLOCK_BYTES, Incoming, Outgoing, TcpIncoming, TcpOutgoing
from workbench.handover.handshake import Refused, accept, connect, introduce
from workbench.handover.identity import Identity
from workbench.handover.kv_shares import KVMemory
from workbench.handover.peer import Peer
from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.rooms import Rooms
from workbench.handover.shared_memory import ShmIncoming, ShmOutgoing
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    HandsShaken,
    KVArrived,
    KVSent,
    Letter,
    Order,
    PagesSetAside,
    PeerGone,
    Room,
    SendPages,
    Shake,
    StopSending,
    TokenLogprobs,
    Withdrawn,
)
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Pair

HERE = 0
"""Number of an instance in its own letters; those of peers begin at 1."""
NUMBER_BITS = 56
"""Of a handover's number at its router."""
MOST_ROUTERS = 1 << 16
REMEMBERED = 1 << 16
"""Handovers that ended here, of which a peer that has not heard is told again."""
MOST_STRANGERS = 64
"""Connections at a time that have not shaken hands yet."""
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
        settings: WireSettings = WireSettings(),
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``listener`` is bound and listens; ``say`` takes a line for whoever runs the instance."""
        self.identity = identity
        self._memory, self._listener, self._wake, self._settings = memory, listener, wake, settings
        self._tell = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.alarm_s = math.inf
        """When the scheduler is to be woken, on its clock."""
        self.on_first_pages: Callable[[str], None] = lambda request_id: None
        """Is told of requests whose first pages are posted."""
        self._mail: deque[tuple[int, object]] = deque()
        self._peers: list[Peer] = []
        self._by_address: dict[str, Peer] = {}
        self._naming = threading.Lock()
        self._routers: dict[str, int] = {}
        self._router_names: list[str] = []
        self._rooms = Rooms(memory)
        self._to: dict[Room, Peer] = {}
        """Where pages of a handover go that is being sent."""
        self._ended: OrderedDict[Room, Finish] = OrderedDict()
        self._lines: dict[str, float] = {}
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._accept_all, name="peers", daemon=True),
            threading.Thread(target=self._watch, name="peer-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        return self.identity.address

    # -- names --------------------------------------------------------------------------------------------------------------

    def number(self, address: str) -> int:
        """The number of a peer in letters."""
        return self._peer(address).number

    def _peer(self, address: str) -> Peer:
        with self._naming:
            peer = self._by_address.get(address)
            if peer is None:
                peer = Peer(len(self._peers) + 1, address)
                self._peers.append(peer)
                self._by_address[address] = peer
            return peer

    def room(self, router: str, number: int, again: int = 0) -> Room:
        """The room of a handover by its name. Raises ValueError for one that is none."""
        if not (0 <= number < 1 << NUMBER_BITS and 0 <= again < 1 << 31 and 0 < len(router) <= 200):
            raise ValueError("not the name of a handover")
        with self._naming:
            index = self._routers.get(router)
            if index is None:
                if len(self._routers) == MOST_ROUTERS:
                    raise ValueError("there are too many routers")
                index = self._routers[router] = len(self._router_names)
                self._router_names.append(router)
        return (index << NUMBER_BITS) | number, again

    def _name(self, room: Room) -> said.RoomName:
        number, again = room
        return self._router_names[number >> NUMBER_BITS], number & ((1 << NUMBER_BITS) - 1), again

    # -- the scheduler's side -----------------------------------------------------------------------------------------------

    def post(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case Letter(to, message):
                    self._post_letter(self._peers[to - 1], order, message)
                case Shake(number):
                    peer = self._peers[number - 1]
                    if not peer.untold:
                        peer.gone = False
                        self._put(peer, order)
                case SendPages(room=room, to=to):
                    self._to[room] = self._peers[to - 1]
                    if order.first:
                        self.on_first_pages(order.request_id)
                    self._put(self._to[room], order)
                case StopSending(room):
                    if (sender := self._to.pop(room, None)) is not None and self._put(sender, order):
                        sender.stopped.add(room)

    def _post_letter(self, peer: Peer, order: Letter, message: object) -> None:
        if isinstance(message, HandoverEnded):
            self._ended[message.room] = message.finish
            while len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
        if isinstance(message, PagesSetAside):
            with peer.writing:
                if peer.untold:
                    return  # word of it is on its way to the scheduler, who frees these pages
                self._rooms.open(message.room, peer.number, message.pages)
        self._put(peer, order)

    def _put(self, peer: Peer, order: Order) -> bool:
        """Have an order followed; tells whether anybody is there to follow it for."""
        if peer.gone or peer.untold:
            return False
        if peer.thread is None:
            peer.thread = threading.Thread(target=self._send_all, args=(peer,), name=f"to {peer.address}", daemon=True)
            peer.thread.start()
        peer.orders.put((peer.losses, order))
        return True

    def wake_at(self, moment_s: float) -> None:
        self.alarm_s = moment_s

    def take(self) -> list[tuple[int, object]]:
        """What has come since the last call, in order, and from which peer; never waits."""
        found: list[tuple[int, object]] = []
        while self._mail:
            number, message = self._mail.popleft()
            if isinstance(message, PeerGone):
                self._peers[number - 1].untold -= 1
            elif isinstance(message, KVSent):
                self._to.pop(message.room, None)
            found.append((number, message))
        return found

    @property
    def has_mail(self) -> bool:
        return bool(self._mail)

    def accuse(self, number: int, why: str) -> None:
        """Have nothing to do any more with a peer that has said what cannot be."""
        self._lose(self._peers[number - 1], why)

    def close(self) -> None:
        """Take leave of all peers."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a close alone wakes nobody who waits there
        self._listener.close()
        for peer in self._peers:
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

    def _put_mail(self, peer: Peer, message: object) -> None:
        self._mail.append((peer.number, message))
        self._wake()

    def _say(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._lines.get(line, -math.inf) > SAID_AGAIN_S:
            if len(self._lines) > 1000:
                self._lines.clear()
            self._lines[line] = now_s
            self._tell(line)

    # -- out ----------------------------------------------------------------------------------------------------------------

    def _send_all(self, peer: Peer) -> None:
        while (entry := peer.orders.get()) is not None:
            losses, order = entry
            if isinstance(order, StopSending):
                peer.stopped.discard(order.room)
                peer.sent.pop(order.room, None)
                continue
            if losses != peer.losses or peer.gone or peer.untold:
                continue  # it belongs to what was
            try:
                self._send(peer, order)
            except (Refused, LinkLost) as lost:
                self._lose(peer, str(lost))
            except Exception as error:  # of the memory, which may end before its instance does
                self._lose(peer, f"KV for it cannot be read: {type(error).__name__}: {error}")

    def _send(self, peer: Peer, order: Order) -> None:
        link = peer.link or self._connect(peer)
        match order:
            case Shake(number):
                self._put_mail(peer, HandsShaken(number))
            case SendPages():
                self._send_pages(peer, link, order)
            case Letter(_, message):
                link.send(said.encode(self._written(message)))

    def _written(self, message: object) -> said.Said:
        match message:
            case PagesSetAside(room, request_id, cached_tokens, pages):
                return said.SetAside(self._name(room), request_id, cached_tokens, pages.astype(np.int32).tobytes())
            case Withdrawn(room):
                return said.Withdraw(self._name(room))
            case HandoverEnded(room, finish):
                return said.Ended(self._name(room), finish.kind, finish.detail)
            case Generate(rid=rid, prompt=tokens, params=params, pair=pair):
                assert pair is not None
                data = tokens.astype(np.int32).tobytes()
                more = message.written_tokens, params, message.priority, message.namespace
                return said.Prefill(self._name(pair.room), rid, data, *more)
        raise TypeError(f"a letter of type {type(message).__name__} goes to no peer")

    def _send_pages(self, peer: Peer, link: Link, order: SendPages) -> None:
        room, carrier, memory = order.room, peer.carrier, self._memory
        assert carrier is not None
        if len(order.pages) != len(order.target_pages):
            raise LinkLost(
                f"it set aside {len(order.target_pages)} pages where a prompt goes on for {len(order.pages)}"
            )
        name = self._name(room)
        if order.first:
            peer.sent[room] = 0
            link.send(said.encode(said.Again(name)))
        first = peer.sent.get(room, 0)
        step = self._pages_at_a_time()
        for at in range(0, len(order.pages), step):
            pages, target = order.pages[at : at + step], order.target_pages[at : at + step].astype(np.int32)
            for box in memory.sources:
                if room in peer.stopped:
                    return
                data = memory.read(box, pages)
                block = said.Block(name, (*box,), first + at, target.tobytes(), data.nbytes)
                carrier.send(link, block, data)
        peer.sent[room] = first + len(order.pages)
        if order.last and room not in peer.stopped:
            peer.sent.pop(room, None)
            link.send(said.encode(said.Sent(name, order.token, order.cached_tokens, order.logprobs)))

    def _pages_at_a_time(self) -> int:
        shape = self._memory.shape
        return max(BLOCK_BYTES // max(shape.block_bytes(box, 1) for box in self._memory.sources), 1)

    def _connect(self, peer: Peer) -> Link:
        self._check_reach(peer)
        link = connect(peer.address)
        offered = self._carriers()
        chosen: Outgoing | None = None
        try:
            other, name = introduce(
                link, self._settings.key, self.identity, {each.name: each.offer() for each in offered}
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
            peer.link, peer.carrier, peer.instance_id = link, chosen, other.instance_id
        threading.Thread(target=self._read_answers, args=(peer, link), name=f"from {peer.address}", daemon=True).start()
        return link

    def _check_reach(self, peer: Peer) -> None:
        if self._settings.loopback_only and not _is_here(peer.address):
            raise Refused("without --peer-key, peers are on this machine")

    def _carriers(self) -> list[Outgoing]:
        """The ways to offer, the best first."""
        asked = self._settings.carrier
        found: list[Outgoing] = []
        if asked in ("auto", "shm"):
            step = self._pages_at_a_time()
            try:
                found.append(
                    ShmOutgoing(max(self._memory.shape.block_bytes(box, step) for box in self._memory.sources))
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
                    case said.Received(room):
                        self._put_mail(peer, KVSent(self._room_of(room)))
                    case said.Taken(place):
                        carrier = peer.carrier
                        if carrier is not None:
                            carrier.freed(place)
                    case said.Bye():
                        self._lose(peer, "", link)
                        return
                    case said.Fault(line):
                        raise LinkLost(f"it says: {line[:300]}")
        except LinkLost as lost:
            self._lose(peer, str(lost), link)

    # -- in -----------------------------------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        for number in count():
            try:
                connection, origin = self._listener.accept()
            except OSError:
                if self._closing.is_set():
                    return
                time.sleep(0.1)  # out of files, say: it may pass
                continue
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=self._shake, args=(Link(connection), origin[0]), name=f"peer-{number}", daemon=True
            ).start()

    def _shake(self, link: Link, origin: str) -> None:
        carriers: dict[str, Incoming] = {}
        try:
            other, chosen = accept(
                link, self._settings.key, self.identity, lambda offers: self._choose(offers, carriers)
            )
            if self._settings.loopback_only and not _is_here(other.address):
                raise Refused("without --peer-key, peers are on this machine")
        except (Refused, LinkLost) as error:
            link.close()
            if not self._closing.is_set():
                self._say(f"peer: a connection from {origin} was refused: {error}")
            return
        finally:
            self._strangers.release()
        peer = self._peer(other.address)
        with peer.lock:
            anew = peer.incoming is not None or (
                peer.link is not None and peer.instance_id not in ("", other.instance_id)
            )
        if anew:
            self._lose(peer, "it has begun anew")
        with peer.lock:
            peer.incoming, peer.instance_id = link, other.instance_id
            peer.gone = False
        self._read(peer, link, carriers[chosen])

    def _choose(self, offers: dict[str, bytes], made: dict[str, Incoming]) -> str:
        """Pick a way for KV to come, of those that are offered; empty: none will do."""
        asked = self._settings.carrier
        if "shm" in offers and asked in ("auto", "shm"):
            try:
                made["shm"] = ShmIncoming(offers["shm"])
                return "shm"
            except (OSError, ValueError):
                pass  # another machine, or another user
        if "tcp" in offers and asked in ("auto", "tcp"):
            made["tcp"] = TcpIncoming()
            return "tcp"
        made[""] = TcpIncoming()
        return ""

    def _read(self, peer: Peer, link: Link, carrier: Incoming) -> None:
        decodes = self.identity.role == "decode"
        try:
            while True:
                match link.receive(said.said_decoder):
                    case said.Ping():
                        pass
                    case said.Bye():
                        self._lose(peer, "", link)
                        return
                    case said.SetAside(name, request_id, cached_tokens, pages) if not decodes:
                        self._set_aside(peer, self._room_of(name), request_id, cached_tokens, pages)
                    case said.Prefill() as again if not decodes:
                        self._put_mail(peer, self._again(peer, again))
                    case said.Withdraw(name) if not decodes:
                        self._put_mail(peer, Withdrawn(self._room_of(name)))
                    case said.Block() as block if decodes:
                        self._take_block(peer, link, carrier, block)
                    case said.Again(name) if decodes:
                        with peer.writing:
                            self._check_current(peer, link)
                            self._rooms.begin_again(self._room_of(name), peer.number)
                    case said.Sent() as sent if decodes:
                        self._complete(peer, link, sent)
                    case said.Ended(name, kind, detail) if decodes:
                        self._handover_ended(peer, link, self._room_of(name), kind, detail)
                    case message:
                        raise LinkLost(
                            f"it sent a {type(message).__name__} to an instance that is there to {self.identity.role}"
                        )
        except LinkLost as lost:
            with contextlib.suppress(LinkLost):
                link.limit(1.0)
                link.send_if_free(said.encode(said.Fault(str(lost))))
            self._lose(peer, str(lost), link)
        except Exception as error:  # of the memory, which may end before its instance does
            self._lose(peer, f"KV of it cannot be written: {type(error).__name__}: {error}", link)
        finally:
            link.close()
            carrier.close()

    def _set_aside(self, peer: Peer, room: Room, request_id: str, cached_tokens: int, pages: bytes) -> None:
        if len(pages) % 4 or cached_tokens < 0:
            raise LinkLost("it set aside what are no pages")
        if room in self._ended:
            self.post([Letter(peer.number, HandoverEnded(room, self._ended[room]))])
            return
        self._put_mail(peer, PagesSetAside(room, request_id[:200], cached_tokens, np.frombuffer(pages, np.int32)))

    def _again(self, peer: Peer, again: said.Prefill) -> Generate:
        """A request of a peer that has lost its KV there."""
        room = self._room_of(again.room)
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
        room = self._room_of(block.room)
        with peer.writing:
            self._rooms.check(room, peer.number, block)
        data = carrier.take(link, block)
        with peer.writing:
            self._check_current(peer, link)
            self._rooms.write(room, peer.number, block, data)
        if carrier.answers:
            link.send(said.encode(said.Taken(block.place)))

    def _complete(self, peer: Peer, link: Link, sent: said.Sent) -> None:
        room = self._room_of(sent.room)
        with peer.writing:
            self._check_current(peer, link)
            logprobs = None if sent.logprobs is None else TokenLogprobs(*sent.logprobs)
            arrived = KVArrived(room, sent.token, max(sent.cached_tokens, 0), logprobs)
            self._rooms.complete(room, peer.number, lambda: self._put_mail(peer, arrived))
        link.send(said.encode(said.Received(sent.room)))

    def _handover_ended(self, peer: Peer, link: Link, room: Room, kind: str, detail: str) -> None:
        if kind not in ("aborted", "rejected"):
            raise LinkLost(f"it ended a handover as {kind[:40]!r}")
        with peer.writing:
            self._check_current(peer, link)
            self._rooms.close(room, peer.number)
            self._put_mail(peer, HandoverEnded(room, Finish(kind, detail[:100])))  # type: ignore[arg-type]

    def _check_current(self, peer: Peer, link: Link) -> None:
        if peer.incoming is not link:
            raise LinkLost("the connection is at an end")

    def _room_of(self, name: said.RoomName) -> Room:
        try:
            return self.room(*name)
        except ValueError as error:
            raise LinkLost(f"it named a handover that cannot be: {error}") from None

    # -- the end of a peer --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        limit_s = self._settings.timeout_s
        while not self._closing.wait(min(limit_s / 4, 1.0)):
            for peer in list(self._peers):
                with peer.lock:
                    link, incoming = peer.link, peer.incoming
                for one in (link, incoming):
                    if one is not None and time.monotonic() - one.heard_s > limit_s:
                        self._lose(peer, f"it has been silent for {limit_s:g} s", one)
                # Both sides say something by themselves: whoever sends pages says nothing else for long.
                for one, sign in ((link, said.Ping()), (incoming, said.Pong())):
                    if one is not None:
                        try:
                            one.send_if_free(said.encode(sign))
                        except LinkLost as lost:
                            self._lose(peer, str(lost), one)

    def _lose(self, peer: Peer, why: str, link: Link | None = None) -> None:
        """A connection of a peer is lost, or all are (None): so is everything that is shared with it. ``why`` is empty where
        it ended in order."""
        with peer.lock:
            if link is not None and link not in (peer.link, peer.incoming):
                return  # it is known
            links, carrier = [one for one in (peer.link, peer.incoming) if one is not None], peer.carrier
            peer.link = peer.incoming = peer.carrier = None
            peer.instance_id = ""
            peer.gone = True
            peer.losses += 1
            peer.untold += 1
        for one in links:
            one.close()
        if carrier is not None:
            carrier.close()
        with peer.writing:  # whoever writes is done first, and nobody does any more
            self._rooms.close_all(peer.number)
        if self._closing.is_set():
            return
        self._put_mail(peer, PeerGone(peer.number))
        if why:
            self._say(f"peer {peer.address}: {why}")


def _is_here(address: str) -> bool:
    """Tell whether a peer is on this machine."""
    try:
        return is_loopback(split_address(address)[0])
    except ValueError:
        return False
