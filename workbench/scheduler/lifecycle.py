"""The requests a scheduler knows, and the ways in which one loses what it holds: retracted, cut off, ended."""

from __future__ import annotations

from collections.abc import Callable

from workbench.scheduler.flights import Flights
from workbench.scheduler.kv.memory import KVMemory
from workbench.scheduler.queue import WaitingQueue
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.running import place_of
from workbench.scheduler.sessions import Sessions
from workbench.scheduler.slots import Slots


class Lifecycle:
    """Requests from their acceptance to their end."""

    def __init__(
        self, kv: KVMemory, slots: Slots, queue: WaitingQueue, flights: Flights, *, keep_aborted: bool
    ) -> None:
        self.by_id: dict[str, Req] = {}
        """Those that have not ended."""
        self.constrained = 0
        """How many of them have a grammar."""
        self.sessions = Sessions()
        self.ended: list[Req] = []
        """Ended outside the processing of a batch, to be reported with the next result."""
        self.retracted: list[Req] = []
        """Retracted while the batch being formed was formed."""
        self._kv = kv
        self._slots = slots
        self._queue = queue
        self._flights = flights
        self._keep_aborted = keep_aborted
        """What an aborted request has computed goes to the prefix cache."""
        self.save: Callable[[Req], None] | None = None
        """Is told of a request that is about to lose its KV, and what it holds of it."""
        self.requeue: Callable[[Req], None] = queue.put_back
        """Takes a request that has lost its KV."""
        self.closed: Callable[[Req], None] | None = None
        """Is told of every request that ends, while it still holds what it has."""

    def accept(self, req: Req) -> None:
        """Take a request into the queue."""
        self.know(req)
        self._queue.arrive(req)

    def know(self, req: Req) -> None:
        """Take note of a request, which waits elsewhere first."""
        if req.session is not None:
            req.session.busy = True
        self.by_id[req.rid] = req
        self.constrained += req.grammar is not None

    def reject(self, req: Req, reason: str) -> None:
        """Refuse a request, which was never known."""
        req.finish = Finish("rejected", reason)
        self.ended.append(req)

    # -- back to the queue -------------------------------------------------------------------------------------------

    def retract(self, req: Req, *, requeue: bool = True) -> None:
        """Take the KV of a request, which says of it what is true, away, keep what it has generated, and put it back into
        the queue, unless the caller does that."""
        req.last_need = len(req.tokens)
        if self.save is not None:
            self.save(req)
        if req.kv_len >= len(req.tokens):
            known = req.kv_len + 1 - self._flights.coming(req)
            req.tokens = self._kv.table.tokens(req.row, known).copy()
            req.output_len = known - req.input_len
        self._kv.cache.release(req, 0, req.kv_len + req.spare_tokens, insert=False)
        self._flights.retract(req)
        req.kv_len = req.spare_tokens = 0
        req.retractions += 1
        self.retracted.append(req)
        if requeue:
            self.requeue(req)
        self._slots.reopen()

    def retract_chunked(self) -> None:
        """Give up the partly computed prompt."""
        (req,) = self._slots.partial
        self._slots.partial.clear()
        self.retract(req)

    def forget_kv(self) -> None:
        """Take everybody's KV away, keeping what they have generated, and empty the prefix cache: no token in it is worth
        anything any more. Nothing may be in flight."""
        assert not self._flights, "a batch in flight reads what would be forgotten"
        for slot in self._slots:
            for req in slot.running.remove(range(slot.running.count)):
                self.retract(req)
        while self._slots.partial:
            self.retract(self._slots.partial.pop())
        self._kv.flush()
        assert self._kv.pool.free == self._kv.pool.total, "somebody still holds KV"

    # -- the end -----------------------------------------------------------------------------------------------------

    def end(self, req: Req, finish: Finish, valid_tokens: int = 0, held_tokens: int = 0) -> None:
        """Mark a request as ended and give back what it holds, once no batch in flight reads it.

        ``valid_tokens`` of its KV are worth keeping in the prefix cache; its pages cover ``held_tokens``.
        """
        self.close(req, finish)
        if req.row >= 0:
            self._flights.release(req, valid_tokens, held_tokens)
        elif req in self.retracted:
            self.retracted.remove(req)  # the next batch must not name who has ended before it
        else:
            # Nor must one that is formed already and whose launch waits for the result that ends it.
            for batch in self._flights:
                if req in batch.retracted:
                    batch.retracted = [other for other in batch.retracted if other is not req]

    def close(self, req: Req, finish: Finish) -> None:
        """Mark a request as ended, whatever it holds."""
        req.finish = finish
        del self.by_id[req.rid]
        self.constrained -= req.grammar is not None
        if req.session is not None:
            self.sessions.ended(req, self._kv.table)
        if self.closed is not None:
            self.closed(req)

    def cut(self, req: Req, finish: Finish) -> None:
        """End a request between batches, wherever it is, to be reported with the next result."""
        if req.row < 0:
            self._queue.remove([req])
            self.end(req, finish)
        else:
            running = self._slots[req.slot].running
            index = place_of(req, running.reqs)
            if index is not None:
                running.remove([index])
            if req in self._slots.partial:
                self._slots.partial.remove(req)
            else:
                # Every computed token after the prompt was an output, and so is the last sample, unless still in flight.
                req.output_len = req.output_at(req.kv_len) - self._flights.coming(req)
            valid = req.kv_len - self._flights.doubtful(req) if self._keep_aborted else 0
            self.end(req, finish, valid, req.kv_len + req.spare_tokens)
        self.ended.append(req)

    def written(self, rid: str) -> int:
        """Count the output tokens that a request has been given, 0 for one that is not known."""
        req = self.by_id.get(rid)
        if req is None:
            return 0
        for slot in self._slots:
            index = place_of(req, slot.running.reqs)
            if index is not None:
                kv_len = int(slot.running.lens[index])
                return max(req.output_at(kv_len) - self._flights.coming(req), 0)
        return req.output_len

    # -- reports -----------------------------------------------------------------------------------------------------

    def take_ended(self) -> list[Req]:
        """Requests that ended outside the processing of a batch, since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def take_retracted(self) -> list[Req]:
        """Requests retracted since the last batch was formed."""
        retracted, self.retracted = self.retracted, []
        return retracted
