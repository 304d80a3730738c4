"""The scheduler of a prefill instance: it computes prompts and hands them over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.scheduler.batch import StepOutput
from workbench.scheduler.disaggregated.deadlines import Deadlines
from workbench.scheduler.disaggregated.letters import (
    NOT_SHARED,
    HandoverEnded,
    KVSent,
    Letter,
    Order,
    PagesSetAside,
    PeerGone,
    Room,
    SendPages,
    StopSending,
    TimeIsUp,
    TokenLogprobs,
    TransferFailed,
    Withdrawn,
)
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult


@dataclass(slots=True)
class _Handover:
    """A request and what has been done of its handover."""

    req: Req
    to: int
    pages: np.ndarray | None = None
    """int32: pages of the decode instance, from page ``first`` of the request on; None until it has set them aside."""
    first: int = 0
    sent: int = 0
    """Pages of the request that are there, sent, or being sent."""


class PrefillScheduler(Scheduler):
    """:class:`Scheduler` whose requests wait for a decode instance, are prefilled, and wait until it has their KV.

    The bootstrap queue holds those for which no pages are known on the other side. From there a request goes into the
    ordinary waiting queue, is admitted with an output of one token, and after its last chunk goes into the in-flight
    queue, where it keeps its KV and its row until the transfer is over.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._handovers: dict[Room, _Handover] = {}
        self.bootstrap: dict[Room, Req] = {}
        """Requests without pages on the other side, in the order of arrival."""
        self.in_flight: dict[Room, Req] = {}
        """Requests whose last chunk is computed, until all of it has arrived."""
        self._orders: list[Order] = []
        self._shaking = Deadlines(self.config.handshake_timeout)
        self._sends_first = self.config.first_token == "prefill"
        self._stuck = False
        """Nothing can be formed before a message comes."""
        self.lifecycle.closed = self._closed
        self.lifecycle.save = self._start_over

    # -- in ----------------------------------------------------------------------------------------------------------

    def receive(self, inbox: Iterable[object]) -> None:
        self._stuck = False
        for message in inbox:
            match message:
                case PagesSetAside():
                    self._begin(message)
                case KVSent(room=room):
                    self._handed_over(room)
                case Withdrawn(room=room):
                    self._fail(room, Finish("aborted", "withdrawn"))
                case TransferFailed(room=room):
                    self._fail(room, Finish("aborted", "transfer_failed"))
                case PeerGone(peer=peer):
                    for room in [room for room, one in self._handovers.items() if one.to == peer]:
                        self._fail(room, Finish("aborted", "decode_gone"))
                case TimeIsUp():
                    pass
                case Generate(rid=rid) if (former := self.lifecycle.by_id.get(rid)) is not None and message.pair:
                    # It was sent once more, and word that this is over is still on its way.
                    self._cut(former, Finish("aborted", "withdrawn"))
                    super().receive((message,))
                case _:
                    super().receive((message,))
        super().receive(())  # timeouts of the queue
        for room in self._shaking.over(self.bootstrap, self.queue.clock()):
            self._fail(room, Finish("aborted", "handshake_timeout"))

    def _accept(self, req: Req) -> None:
        assert req.pair is not None, "a prefill instance is told where a request goes on"
        if req.grammar is not None or req.session is not None:
            self._reject(req, NOT_SHARED)
            return
        req.max_new = min(req.max_new, 1)
        req.stop_ids = ()  # what ends it is seen where it is decoded
        self.lifecycle.know(req)
        self.queue.watch(req)
        room = req.pair.room
        self._handovers[room] = _Handover(req, req.pair.peer)
        self.bootstrap[room] = req
        self._shaking.begin(room, self.queue.clock())
        self._count()

    def _reject(self, req: Req, reason: str) -> None:
        super()._reject(req, reason)
        if req.pair is not None and req.finish is not None:
            self._orders.append(Letter(req.pair.peer, HandoverEnded(req.pair.room, req.finish)))

    def _begin(self, message: PagesSetAside) -> None:
        """There is room on the other side: the request may be prefilled."""
        handover = self._handovers.get(message.room)
        if handover is None:
            return  # it has ended here, and the other side has been told
        req = self.bootstrap.pop(message.room)
        handover.pages = message.pages
        handover.first = handover.sent = message.cached_tokens // self.kv.page_size
        self.queue.put(req)
        self._count()

    # -- out ---------------------------------------------------------------------------------------------------------

    def next_batch(self, slot: int = 0) -> ScheduleBatch | None:
        self.slots[slot].full = False
        if self.in_flight:
            self._fruitless = 0  # what is in flight gives KV back
        batch = super().next_batch(slot)
        self._stuck = batch is None and not self.flights
        return batch

    def process(self, batch: ScheduleBatch, output: StepOutput) -> StepResult:
        rows = batch.worker.rows.tolist()
        self.flights.share_computed()  # what the prefix cache has twice is given up before it is sent
        result = super().process(batch, output)
        for i, row in enumerate(batch.prefill):
            # Whoever has lost its row since computes it again, and its KV is sent then.
            if row.req.finish is None and row.req.row == rows[i] and i not in (batch.dropped or ()):
                token = int(output.tokens[i]) if row.samples else None
                self._send(row, token, _logprobs(output, i, row.req) if row.samples else None)
        if not self._sends_first:
            result.first = ()
        return result

    def _conclude(self, req: Req, finish: Finish, valid_tokens: int, held_tokens: int) -> None:
        if finish.kind == "aborted":
            super()._conclude(req, finish, valid_tokens, held_tokens)
        else:
            assert req.pair is not None
            self.in_flight[req.pair.room] = req
            self._count()

    def _send(self, row: PrefillRow, token: int | None, logprobs: TokenLogprobs | None = None) -> None:
        """Send what has been computed of a prompt: whole pages, and with its last chunk the rest."""
        assert row.req.pair is not None
        room, size = row.req.pair.room, self.kv.page_size
        handover = self._handovers[room]
        end = -(-row.end // size) if row.last else row.end // size
        first = handover.sent
        if end <= first:
            return
        assert handover.pages is not None
        handover.sent = end
        pages = self.kv.table.pages(row.req.row, first, end).copy()
        target = handover.pages[first - handover.first : end - handover.first]
        self._orders.append(
            SendPages(
                room,
                row.req.rid,
                handover.to,
                pages,
                target,
                first == handover.first,
                row.last,
                row.end,
                token,
                row.req.cached_tokens,
                logprobs,
            )
        )

    def _start_over(self, req: Req) -> None:
        """A request is about to lose its KV, with its prompt in part: what has been sent of it is sent again."""
        assert req.pair is not None
        handover = self._handovers[req.pair.room]
        if handover.sent > handover.first:
            handover.sent = handover.first
            self._orders.append(StopSending(req.pair.room))

    def take_orders(self) -> list[Order]:
        """Letters and pages for other instances, since the last call."""
        orders, self._orders = self._orders, []
        return orders

    # -- the end -----------------------------------------------------------------------------------------------------

    def _handed_over(self, room: Room) -> None:
        """All of a request has arrived: it is done here. What the prefix cache has of it stays there."""
        req = self.in_flight.get(room)
        if req is not None:
            self._end_aside(req, Finish("handed_over"))

    def _fail(self, room: Room, finish: Finish) -> None:
        """End a request wherever it is, because its handover will not come about."""
        handover = self._handovers.get(room)
        if handover is not None:
            self._cut(handover.req, finish)

    def _is_aside(self, req: Req) -> bool:
        """Tell whether a request is in the bootstrap or the in-flight queue."""
        return req.pair is not None and (req.pair.room in self.bootstrap or req.pair.room in self.in_flight)

    def _ends_with_result(self, req: Req) -> bool:
        return not self._is_aside(req) and super()._ends_with_result(req)

    def _cut(self, req: Req, finish: Finish) -> None:
        if self._is_aside(req):
            self._end_aside(req, finish)
        else:
            super()._cut(req, finish)

    def _end_aside(self, req: Req, finish: Finish) -> None:
        self.lifecycle.end(req, finish, req.kv_len, req.kv_len)
        self.lifecycle.ended.append(req)

    def _closed(self, req: Req) -> None:
        """A request ends: unless all of it has arrived, send nothing more of it, and say so."""
        assert req.pair is not None and req.finish is not None
        room = req.pair.room
        handover = self._handovers.pop(room)
        self.bootstrap.pop(room, None)
        self.in_flight.pop(room, None)
        self._count()
        if req.finish.kind == "handed_over":
            return
        if handover.sent > handover.first:
            self._orders.append(StopSending(room))
        self._orders.append(Letter(handover.to, HandoverEnded(room, req.finish)))

    # -- at rest -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self.flights and not self._updates and (self._stuck or super().idle)

    @property
    def due_s(self) -> float:
        """When something may next have run out of time."""
        return min(self.queue.due_s(), self._shaking.next_s(self.bootstrap))

    def rest(self) -> None:
        if self.in_flight or self.slots.partial:
            self.flights.share_computed()
        else:
            super().rest()

    def _held_aside(self) -> list[tuple[Req, int]]:
        return [(req, req.kv_len) for req in self.in_flight.values()]

    def _count(self) -> None:
        self.queue.elsewhere = len(self.bootstrap)
        self.kv.table.aside = len(self.in_flight)


def _logprobs(output: StepOutput, index: int, req: Req) -> TokenLogprobs | None:
    """Return those of the token of a row, as its request asks for them."""
    count, found = req.params.logprobs, output.logprobs
    if count is None or found is None:
        return None
    top, ids = found.top[index][:count], found.top_ids[index][:count]
    return TokenLogprobs(float(found.sampled[index]), tuple(top.tolist()), tuple(ids.tolist()))
