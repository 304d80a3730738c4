"""The inbox of an instance that prefills or decodes alone: what other processes say, and what its peers do."""

from __future__ import annotations

import dataclasses
import math
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from workbench.handover.live_wire import LiveWire
from workbench.handover.shared_state import HERE
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    KVArrived,
    Letter,
    PagesSetAside,
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
        self._opened: OrderedDict[Room, tuple[str, int]] = OrderedDict()
        """Rooms of requests that have come: their ids, and the tokens of their prompts."""
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
        _remember(self._opened, room, (generate.rid, len(generate.prompt)))
        peer = self._wire.number(message.peer)
        early = self._early.pop(room, None)
        if early is not None and (found := self._checked(*early)) is not None:
            self._due.append(found)
        return dataclasses.replace(generate, pair=Pair(room, peer, HERE))

    def _letter(self, peer: int, message: object, found: list[object]) -> None:
        """Take a letter in, or keep it for the request that it is about."""
        if isinstance(message, Generate):
            self._prefill_again(peer, message, found)
            return
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

    def _about(self, room: Room) -> tuple[str, int] | None:
        """Return the id of the request of a room, and the tokens of its prompt; None for one that has not come. Where it is
        decoded, it is the same one whenever it goes through a prefill instance again."""
        number, again = room
        return self._opened.get((number, 0) if self._config.role == "decode" else (number, again))

    def _prefill_again(self, peer: int, message: Generate, found: list[object]) -> None:
        """Take in what a decode instance has lost the KV of."""
        assert message.pair is not None
        if message.prompt.min() < 0 or message.prompt.max() >= self._vocab:
            self._wire.accuse(peer, "it asked for a prompt with tokens that there are not")
            return
        _remember(self._opened, message.pair.room, (message.rid, len(message.prompt)))
        found.append(dataclasses.replace(message, arrival_s=self._now_s()))

    def _checked(self, peer: int, message: object) -> object:
        """Return a letter that can be true; None, with its peer given up, for one that cannot."""
        match message:
            case PagesSetAside(room=room, cached_tokens=cached, pages=pages):
                size, (_, tokens) = self._config.page_size, self._opened[room]
                if cached % size or not len(pages) or cached // size + len(pages) != -(-tokens // size):
                    told = f"it set {len(pages)} pages aside beyond {cached} tokens for a prompt of {tokens}"
                    self._wire.accuse(peer, told)
                    return None
            case KVArrived(room=room, token=token, cached_tokens=cached):
                if token is not None and not 0 <= token < self._vocab:
                    self._wire.accuse(peer, f"it sent a token that there is not: {token}")
                    return None
                message = dataclasses.replace(message, cached_tokens=min(cached, self._opened[room[0], 0][1]))
            case HandoverEnded(room=room, finish=finish) if finish.kind == "rejected" and finish.detail not in KINDS:
                return HandoverEnded(room, Finish("aborted", finish.detail))
        about = self._about(getattr(message, "room", (-1, 0)))
        if self._record is not None and about is not None:
            self._record.told(message, about[0])
        return message

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
