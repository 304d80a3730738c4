"""The inbox of an instance that prefills or decodes alone: what other processes say, and what its peers do."""

from __future__ import annotations

import dataclasses
import math
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from workbench.handover.live_wire import LiveWire
from workbench.handover.wire_state import HERE
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    KVArrived,
    Letter,
    PagesSetAside,
    PeerGone,
    Room,
    TimeIsUp,
    Withdrawn,
)
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Pair
from workbench.serving.engine.inbox import LiveInbox
from workbench.serving.engine.matchers import Matcher
from workbench.serving.engine.paired_record import PairedRecord
from workbench.serving.refusals import KINDS
from workbench.serving.wire import Submit

MOST_LOGPROB = 0.01
"""It is 0, but for rounding."""
REMEMBERED = 1 << 16
"""Rooms of the past, and letters for rooms to come, that are kept."""


class Alarm:
    """Wakes whoever waits for a file descriptor, from any thread."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def ring(self) -> None:
        with suppress(OSError):  # full: it rings already; closed: nobody waits
            self._theirs.send(b"!")

    def hush(self) -> None:
        """Note that it was heard."""
        with suppress(OSError):
            while self._ours.recv(4096):
                pass


@dataclass(slots=True)
class _Opened:
    """A request that has come, as far as letters about it have to go with it."""

    request_id: str
    peer: int
    prompt_tokens: int
    logprobs: int | None
    wants_token: bool
    pages_known: bool = False


class PairedInbox(LiveInbox):
    """:class:`LiveInbox` that has the letters of peers, too, and is over at a moment of its wire's.

    The two halves of a request come by different ways, so that a letter may be here before its request: it waits for it.
    """

    def __init__(
        self,
        *args: Any,
        wire: LiveWire,
        alarm: Alarm,
        config: SchedulerConfig,
        vocab: int,
        now_s: Callable[[], float],
        record: PairedRecord | None,
    ) -> None:
        super().__init__(*args)
        self._record = record
        self._wire, self._alarm, self._now_s = wire, alarm, now_s
        self._config, self._vocab = config, vocab
        self._opened: OrderedDict[Room, _Opened] = OrderedDict()
        """Rooms of requests that have come."""
        self._early: OrderedDict[Room, tuple[int, object]] = OrderedDict()
        """The last letter, and who sent it, about each request that has not come."""
        self._due: list[object] = []
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(alarm.fileno(), zmq.POLLIN)

    def drain(self) -> list[object]:
        found = super().drain()
        found += self._due  # behind the requests that they are for
        self._due = []
        for peer, message in self._wire.take():
            self._letter(peer, message, found)
        if self._wire.alarm_s <= self._now_s():
            self._wire.alarm_s = math.inf
            found.append(TimeIsUp())
        return found

    def _submit(self, message: Submit, grammar: Matcher | str | None = None) -> Generate:
        generate = super()._submit(message, grammar)
        try:
            room = self._wire.room(message.router, message.room)
        except ValueError:
            return dataclasses.replace(generate, refused="duplicate_room")
        if room in self._opened:
            return dataclasses.replace(generate, refused="duplicate_room")
        peer, params = self._wire.number(message.peer), generate.params
        opened = _Opened(generate.rid, peer, len(generate.prompt), params.logprobs, params.max_new_tokens > 0)
        _remember(self._opened, room, opened)
        early = self._early.pop(room, None)
        if early is not None and (found := self._checked(*early)) is not None:
            self._due.append(found)
        return dataclasses.replace(generate, pair=Pair(room, peer, HERE))

    def _letter(self, peer: int, message: object, found: list[object]) -> None:
        """Take a letter in, or keep it for the request that it is about."""
        if isinstance(message, Generate):
            self._prefill_again(peer, message, found)
            return
        if isinstance(message, PeerGone):
            # What it has said of requests to come is void, and nobody would end these.
            for void in [room for room, (sender, _) in self._early.items() if sender == peer]:
                del self._early[void]
        room, size = getattr(message, "room", None), self._config.page_size
        if room is not None and self._about(room) is None:
            if isinstance(message, Withdrawn):
                # It is not here, and when it comes it ends at once: nothing will ever be sent of it.
                self._wire.post([Letter(peer, HandoverEnded(room, Finish("aborted", "withdrawn")))])
            if isinstance(message, PagesSetAside) and len(message.pages) * size > self._config.max_context + size:
                self._wire.accuse(peer, f"it set {len(message.pages)} pages aside, more than any prompt has")
                return
            _remember(self._early, room, (peer, message))
        elif (checked := self._checked(peer, message)) is not None:
            found.append(checked)

    def _about(self, room: Room) -> _Opened | None:
        """Return what is known of the request of a room; None for one that has not come. Where it is
        decoded, it is the same one whenever it goes through a prefill instance again."""
        number, again = room
        return self._opened.get((number, 0) if self._config.role == "decode" else (number, again))

    def _prefill_again(self, peer: int, message: Generate, found: list[object]) -> None:
        """Take in what a decode instance has lost the KV of."""
        assert message.pair is not None
        if message.prompt.min() < 0 or message.prompt.max() >= self._vocab:
            self._wire.accuse(peer, "it asked for a prompt with tokens that there are not")
            return
        room = message.pair.room
        first = self._opened.get((room[0], 0))
        if room in self._opened or (first is not None and first.peer != peer):
            self._wire.accuse(peer, "it asked again for a prompt that it has no part in, or has asked for")
            return
        _remember(self._opened, room, _Opened(message.rid, peer, len(message.prompt), None, False))
        found.append(dataclasses.replace(message, arrival_s=self._now_s()))

    def _checked(self, peer: int, message: object) -> object:
        """Return a letter that can be true; None, with its peer given up, for one that cannot."""
        about = self._about(getattr(message, "room", (-1, 0)))
        if about is None:
            return message  # it is about a peer
        if about.peer != peer:
            self._wire.accuse(peer, "it speaks of a handover that it has no part in")
            return None
        match message:
            case PagesSetAside(cached_tokens=cached, pages=pages):
                size, tokens = self._config.page_size, about.prompt_tokens
                if about.pages_known:
                    self._wire.accuse(peer, "it set pages aside for a handover twice")
                    return None
                if cached % size or not len(pages) or cached // size + len(pages) != -(-tokens // size):
                    told = f"it set {len(pages)} pages aside beyond {cached} tokens for a prompt of {tokens}"
                    self._wire.accuse(peer, told)
                    return None
                about.pages_known = True
            case KVArrived() as arrived:
                if (fault := self._fault(arrived, about)) is not None:
                    self._wire.accuse(peer, fault)
                    return None
                probabilities = None if arrived.token is None or about.logprobs is None else arrived.logprobs
                found = min(arrived.cached_tokens, about.prompt_tokens)
                token = arrived.token if about.wants_token else None
                message = dataclasses.replace(arrived, token=token, cached_tokens=found, logprobs=probabilities)
            case HandoverEnded(room=room, finish=finish) if finish.kind == "rejected" and finish.detail not in KINDS:
                return HandoverEnded(room, Finish("aborted", finish.detail))
        if self._record is not None:
            self._record.told(message, about.request_id)
        return message

    def _fault(self, arrived: KVArrived, about: _Opened) -> str | None:
        """Return what cannot be of a token that came with KV, in one line; None where it can."""
        if arrived.token is None:
            return None
        found = arrived.logprobs
        for token in (arrived.token, *(found.top_ids if found is not None else ())):
            if not 0 <= token < self._vocab:
                return f"it sent a token that there is not: {token}"
        if about.logprobs is None:
            return None
        if found is None or not len(found.top) == len(found.top_ids) <= about.logprobs:
            return "it sent a token without the log probabilities that were asked for"
        if not all(value <= MOST_LOGPROB for value in (found.sampled, *found.top)):
            return "it sent what are no log probabilities"
        return None

    def _wait(self) -> None:
        self._vitals.resting()
        if not self._wire.has_mail:
            left_s = self._wire.alarm_s - self._now_s()
            self._poller.poll(None if left_s == math.inf else max(math.ceil(left_s * 1000), 0))
        self._alarm.hush()
        self._vitals.moved()


def _remember(rooms: OrderedDict[Room, Any], room: Room, value: Any) -> None:
    rooms[room] = value
    while len(rooms) > REMEMBERED:
        rooms.popitem(last=False)
