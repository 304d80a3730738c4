"""The scheduler of a decode instance: it takes requests in with the KV of their prompts, and decodes them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.scheduler.batch import KVCopy, NewRequest, StepOutput
from workbench.scheduler.disaggregated.deadlines import Deadlines
from workbench.scheduler.disaggregated.decode_room import DecodeRoom
from workbench.scheduler.disaggregated.letters import (
    NOT_SHARED,
    HandoverEnded,
    HandsShaken,
    KVArrived,
    Letter,
    Order,
    PagesSetAside,
    PeerGone,
    Room,
    Shake,
    TimeIsUp,
    TokenLogprobs,
    Withdrawn,
)
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Pair, Req
from workbench.scheduler.running import place_of
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.scheduler.stops import stop_ids_of


@dataclass(slots=True)
class _Arrival:
    """A request whose KV is all there."""

    req: Req
    token: int | None
    """Its newest token, which is not in KV; None where it wants no output."""
    fresh: bool
    """The token was not sent yet: a prefill instance sampled it."""
    logprobs: TokenLogprobs | None = None


class DecodeScheduler(Scheduler):
    """:class:`Scheduler` whose requests get pages first, then their KV from a prefill instance, and then decode.

    A request waits in the preallocation queue until hands are shaken and there is room, in the transfer queue until its KV
    has arrived, and then for a place in the running set. Who is retracted comes back before anybody new: from the host's
    memory, or through the preallocation queue and a prefill instance again.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.preallocation: list[Req] = []
        """Without pages: those retracted first, then in the order of arrival."""
        self.transfer: dict[Room, Req] = {}
        """With pages, into which KV is being written or will be."""
        self.arrived: list[_Arrival] = []
        """With all their KV, in the order in which it came."""
        self.retracted: list[Req] = []
        """With their KV in the host's memory, in the order of arrival."""
        self.draining: dict[Room, Req] = {}
        """Ended, but their pages may still be written."""
        self._again: list[Req] = []
        """Retracted, and to be prefilled again once their last token is known."""
        self._shaken: set[int] = set()
        self._shaking: set[int] = set()
        self._orders: list[Order] = []
        self._sending = Deadlines(self.config.transfer_timeout)
        self._room = DecodeRoom(self.config, self._parts)
        self._sends_first = self.config.first_token == "decode"
        self._through_host = self.config.decode_retraction == "host"
        self.lifecycle.requeue = self._requeue
        self.lifecycle.closed = self._closed
        if self._through_host:
            self.lifecycle.save = self._save

    # -- in ----------------------------------------------------------------------------------------------------------

    def receive(self, inbox: Iterable[object]) -> None:
        for message in inbox:
            match message:
                case HandsShaken(peer=peer):
                    self._shaking.discard(peer)
                    self._shaken.add(peer)
                case KVArrived():
                    self._arrive(message)
                case HandoverEnded(room=room, finish=finish):
                    self._handover_ended(room, finish)
                case PeerGone(peer=peer):
                    self._lose(peer)
                case TimeIsUp():
                    pass
                case _:
                    super().receive((message,))
            self.slots.reopen()
            self._count()
        super().receive(())  # timeouts
        for room in self._sending.over(self.transfer, self.queue.clock()):
            self._cut(self.transfer[room], Finish("aborted", "transfer_timeout"))

    def _accept(self, req: Req) -> None:
        assert req.pair is not None, "a decode instance is told where a request is prefilled"
        if req.grammar is not None or req.session is not None:
            self._reject(req, NOT_SHARED)
            return
        self.lifecycle.know(req)
        self.queue.watch(req)
        self.preallocation.append(req)
        self._shake(req.pair.peer)

    def _reject(self, req: Req, reason: str) -> None:
        super()._reject(req, reason)
        if req.pair is not None:
            self._orders.append(Letter(req.pair.peer, Withdrawn(req.pair.room)))

    def _shake(self, peer: int) -> None:
        if peer not in self._shaken and peer not in self._shaking:
            self._shaking.add(peer)
            self._orders.append(Shake(peer))

    def _arrive(self, message: KVArrived) -> None:
        room = message.room
        if room in self.draining:
            self._drained(room)
        elif (req := self.transfer.pop(room, None)) is not None:
            if not room[1]:
                req.cached_tokens = message.cached_tokens
            self.arrived.append(_Arrival(req, message.token, fresh=True, logprobs=message.logprobs))

    # -- queues ------------------------------------------------------------------------------------------------------

    def poll(self) -> StepResult | None:
        """Look at the queues, before a batch is chosen: give pages to whoever there is room for, and have those whose KV has
        arrived join the running set. Returns what that brings, None if nothing.

        What cannot go on now is looked at again when a message comes or something is given back.
        """
        slot = self.slots[0]
        if slot.full or self.held or not (self.queue.elsewhere or self._again):
            return None
        slot.full = True  # unless what is done now gives something back
        self._ask_again()
        self._resume()
        if not self.retracted:
            self._preallocate()
        result = self._join()
        self._count()
        return result

    def process(self, batch: ScheduleBatch, output: StepOutput) -> StepResult:
        result = super().process(batch, output)
        if batch.late:
            self.slots.reopen()  # the last token of somebody retracted is known: it may come back
        return result

    def _alone(self) -> bool:
        """Nobody else holds KV, or gives any back."""
        return not (self.slots[0].running.count or self.transfer or self.arrived or self.draining or self.flights)

    def _preallocate(self) -> None:
        """Set pages aside for the first in the queue, and those behind it, until one does not fit."""
        left = self._room.left(len(self.transfer) + len(self.arrived))
        waiting: list[Req] = []
        queue = self.preallocation
        for place, req in enumerate(queue):
            assert req.pair is not None
            if req.pair.peer not in self._shaken:
                waiting.append(req)
                continue
            if not self.kv.table.free_rows or (taken := self._take_pages(req, len(req.tokens), left)) is None:
                waiting += queue[place:]
                break
            cached, pages, left = taken
            room = req.pair.room
            self.transfer[room] = req
            self._sending.begin(room, self.queue.clock())
            self._orders.append(Letter(req.pair.peer, PagesSetAside(room, req.rid, cached, pages)))
        self.preallocation = waiting

    def _resume(self) -> None:
        """Copy retracted requests in again, the first of them first, until one does not fit."""
        while self.retracted and not self.retracted[0].pending_token and self.kv.table.free_rows:
            req = self.retracted[0]
            tokens = len(req.tokens) - 1  # the newest is not in KV yet
            left = self._room.left(len(self.transfer) + len(self.arrived))
            taken = self._take_pages(req, tokens, left, resumes=True)
            if taken is None:
                return
            del self.retracted[0]
            self.assembly.copies.append(
                KVCopy("load", taken[1], req.rid, req.shared_pages) if len(taken[1]) else self._forgets(req)
            )
            self.arrived.insert(0, _Arrival(req, int(req.tokens[-1]), fresh=False))

    def _take_pages(
        self, req: Req, tokens: int, left: int, *, resumes: bool = False
    ) -> tuple[int, np.ndarray, int] | None:
        """Give a request a row, and pages for so many of its tokens, of which the prefix cache may have some, if there is
        room. Returns how many it has, the pages for the others, and what room is left; None where there is not enough."""
        kv = self.kv
        match = kv.cache.match(req)
        cached = match.device
        loose = kv.cache.loose_pages(match.node) * kv.page_size  # locking takes these from what may be set aside
        least = self._room.need(tokens - cached) if resumes else self._room.least(req, tokens - cached)
        if least > left - loose and not self._alone():
            return None
        kv.cache.lock(match.node)
        count = kv.pages_for(tokens) - cached // kv.page_size
        if count > kv.available_pages:
            kv.cache.unlock(match.node)
            return None
        req.row = row = kv.table.take_row()
        req.node, req.shared_pages, req.kv_len = match.node, cached // kv.page_size, tokens
        pages = kv.allocate(count)
        kv.table.write_tokens(row, req.tokens)
        kv.table.write_pages(row, 0, np.concatenate((kv.cache.path_pages(match.node), pages)) if cached else pages)
        kv.cache.started(req)
        return cached, pages, left - loose - self._room.need(tokens - cached)

    def _join(self) -> StepResult | None:
        """Have requests whose KV has arrived run, as far as there are places: a batch that needs no forward."""
        slot = self.slots[0]
        places = self.config.max_running - slot.running.count
        if not self.arrived or places <= 0:
            return None
        joining, self.arrived = self.arrived[:places], self.arrived[places:]
        result = StepResult(None, None, joined=[_joined(one) for one in joining])
        runs: list[Req] = []
        for one in joining:
            finish = self._given(one, result)
            if finish is None:
                runs.append(one.req)
            else:
                self.lifecycle.end(one.req, finish, one.req.kv_len, one.req.kv_len)
                result.ended = [*result.ended, one.req]
        if runs:
            width = self.kv.table.width
            numbers = [(req.row, req.kv_len, req.end_len, req.row * width + req.kv_len) for req in runs]
            rows, lens, ends, token_at = np.array(numbers, np.int64).T.copy()
            slot.running.add(runs, rows, lens, ends, token_at, stop_ids_of(runs))
        return result

    def _given(self, one: _Arrival, result: StepResult) -> Finish | None:
        """Give a request that joins its newest token; returns how it ends with it, None where it goes on."""
        req, kv = one.req, self.kv
        kv.cache.insert(req)
        kv.cache.fill(req, req.kv_len)
        if one.token is None:
            return Finish("length")
        tokens = np.concatenate((req.tokens[: req.kv_len], np.array([one.token], np.int32)))
        kv.table.write_tokens(req.row, tokens)
        self.assembly.joining[req.row] = NewRequest(req.row, req.rid, req.input_len, tokens, req.params)
        if one.fresh:
            first = req.output_len == 0
            req.output_len = len(tokens) - req.input_len
            if first and self._sends_first:
                result.first = [*result.first, req]
            if req.output_len >= req.max_new:
                return Finish("length")
            if one.token in req.stop_ids:
                return Finish("stop")
        return None

    # -- retraction --------------------------------------------------------------------------------------------------

    def _save(self, req: Req) -> None:
        """Copy the KV of a request that is about to lose it to the host, before the next batch."""
        pages = self.kv.table.pages(req.row, 0, self.kv.pages_for(req.kv_len)).copy()
        self.assembly.copies.append(KVCopy("save", pages, req.rid))

    def _forgets(self, req: Req) -> KVCopy:
        """What the host's memory has of a request is of no use any more."""
        return KVCopy("forget", np.empty(0, np.int32), req.rid)

    def _requeue(self, req: Req) -> None:
        if self._through_host:
            insort(self.retracted, req, key=lambda one: one.seq)
        else:
            self._again.append(req)
        self._count()

    def _ask_again(self) -> None:
        """Have requests prefilled again that were retracted, once their last token is known."""
        for req in [req for req in self._again if not req.pending_token]:
            assert req.pair is not None
            if req.pair.peer not in self._shaken:  # gone since, with nobody to prefill it
                self._cut(req, Finish("aborted", "prefill_gone"))
                continue
            self._again.remove(req)
            room = (req.pair.room[0], req.pair.room[1] + 1)
            _, peer, here = req.pair
            req.pair, other = Pair(room, peer, here), Pair(room, here, peer)
            again = Generate(
                *(req.rid, req.tokens, req.params, req.arrival_s, req.priority, req.namespace),
                pair=other,
                written_tokens=len(req.tokens) - req.input_len,
            )
            self._orders.append(Letter(peer, again))
            insort(self.preallocation, req, key=lambda one: (not one.retractions, one.seq))

    # -- the end -----------------------------------------------------------------------------------------------------

    def _is_aside(self, req: Req) -> bool:
        """Tell whether a request is in one of the queues."""
        return (
            req in self.preallocation
            or (req.pair is not None and req.pair.room in self.transfer)
            or any(one.req is req for one in self.arrived)
            or req in self.retracted
            or req in self._again
        )

    def _ends_with_result(self, req: Req) -> bool:
        return super()._ends_with_result(req) and not self._is_aside(req)

    def _cut(self, req: Req, finish: Finish) -> None:
        if not self._is_aside(req):
            super()._cut(req, finish)
            return
        assert req.pair is not None
        room = req.pair.room
        if room in self.transfer:
            # Its pages are nobody else's until it is certain that nothing more is written there.
            self._orders.append(Letter(req.pair.peer, Withdrawn(room)))
            self.draining[room] = self.transfer.pop(room)
            self.lifecycle.close(req, finish)
        else:
            if req in self.preallocation:
                self._orders.append(Letter(req.pair.peer, Withdrawn(room)))
            self.lifecycle.end(req, finish, req.kv_len if req.row >= 0 else 0, req.kv_len)
        self.lifecycle.ended.append(req)
        self._count()

    def _closed(self, req: Req) -> None:
        """A request ends: it waits in no queue any more."""
        if req.row < 0:
            self.preallocation = [one for one in self.preallocation if one is not req]
            if req in self.retracted:
                self.retracted.remove(req)
                self.assembly.copies.append(self._forgets(req))
            self._again = [one for one in self._again if one is not req]
        else:
            self.arrived = [one for one in self.arrived if one.req is not req]
            self.assembly.joining.pop(req.row, None)

    def _handover_ended(self, room: Room, finish: Finish) -> None:
        """Nothing more of a handover is written."""
        if room in self.draining:
            self._drained(room)
            return
        req = self.transfer.pop(room, None)
        if req is None:
            req = next((one for one in self.preallocation if one.pair is not None and one.pair.room == room), None)
        if req is not None:
            if finish.kind == "rejected" and req.retractions:
                finish = Finish("aborted", finish.detail)
            self.lifecycle.end(req, finish, 0, req.kv_len)
            self.lifecycle.ended.append(req)

    def _drained(self, room: Room) -> None:
        req = self.draining.pop(room)
        self.flights.release(req, 0, req.kv_len)

    def _lose(self, peer: int) -> None:
        """A prefill instance is gone: what it has not delivered never comes."""
        self._shaken.discard(peer)
        self._shaking.discard(peer)
        gone = Finish("aborted", "prefill_gone")
        for waiting in (self.draining, self.transfer):
            for room in [room for room, req in waiting.items() if req.pair is not None and req.pair.peer == peer]:
                self._handover_ended(room, gone)
        for req in [req for req in self.preallocation if req.pair is not None and req.pair.peer == peer]:
            self._cut(req, gone)

    # -- at rest -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        if self.flights or self._updates or not self.slots.empty:
            return False
        return self.slots[0].full or not (self.queue.elsewhere or self._again) or self.paused

    @property
    def due_s(self) -> float:
        """When something may next have run out of time."""
        return min(self.queue.due_s(), self._sending.next_s(self.transfer))

    def rest(self) -> None:
        if not (self.transfer or self.arrived or self.draining):
            super().rest()

    def written(self, rid: str) -> int:
        """Count the tokens that an open request has been given."""
        req = self.lifecycle.by_id.get(rid)
        if req is None:
            return 0
        running = self.slots[req.slot].running
        index = place_of(req, running.reqs)
        if index is not None:
            return req.output_at(int(running.lens[index])) - self.flights.coming(req)
        ending = self.flights.of(req)  # with its last step, it has left the running set already
        return req.max_new - len(ending) if ending and req.row >= 0 else req.output_len

    def take_orders(self) -> list[Order]:
        """Letters to other instances, since the last call."""
        orders, self._orders = self._orders, []
        return orders

    def _held_aside(self) -> list[tuple[Req, int]]:
        aside = [*self.transfer.values(), *(one.req for one in self.arrived), *self.draining.values()]
        return [(req, req.kv_len) for req in aside]

    def _count(self) -> None:
        self.queue.elsewhere = len(self.preallocation) + len(self.arrived) + len(self.retracted)
        self.kv.table.aside = len(self.transfer) + len(self.arrived) + len(self.draining)


def _joined(one: _Arrival) -> tuple[Req, int | None, TokenLogprobs | None]:
    return one.req, one.token if one.fresh else None, one.logprobs
