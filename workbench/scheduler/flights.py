"""Batches in flight: formed and not yet processed, and what becomes of their requests in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from workbench.scheduler.batch import StepOutput
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.memory import KVMemory
from workbench.scheduler.request import Req
from workbench.scheduler.running import place_of
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.slots import Slot, Slots


class Flights(deque[ScheduleBatch]):
    """Batches in flight, oldest first, and what is put off until they land.

    A batch reads the rows of its requests until it has been processed, so a row is free only then. Pages are free at once:
    whoever gets them writes in a later batch of the same stream.
    """

    def __init__(self, config: SchedulerConfig, kv: KVMemory, slots: Slots) -> None:
        super().__init__()
        self.at_once = config.give_back != "landed"
        """Whoever ends gives back its KV, and its claim to a row, though a batch in flight holds it."""
        self._spare_rows = config.rows - config.max_running_per_slot * config.slots
        self._drafts = config.draft_tokens > 0
        self._kv = kv
        self._slots = slots
        self._share_prompts = config.share_prompts == "launch"
        self._share_chunks = config.share_chunks
        self._loses = config.in_flight_token == "lose"
        self.computed: Sequence[Req] = ()
        """Prompts of the last batch, which are still to be shared with the next choice of a batch."""

    def of_slot(self, slot: Slot) -> bool:
        """Tell whether a batch of a slot is in flight."""
        return any(batch.slot == slot.index for batch in self)

    # -- launch ------------------------------------------------------------------------------------------------------

    def launch_prefill(self, batch: ScheduleBatch) -> None:
        """Append a batch that has just been formed and has prompts in it."""
        self.append(batch)
        self.computed = [row.req for row in batch.prefill if (self._share_prompts if row.last else self._share_chunks)]

    def share_computed(self) -> None:
        """Put the prompts of the last prefill into the prefix cache: the batch that computes them has been launched, and
        batches run in order."""
        for req in self.computed:
            self.share(req)
        self.computed = ()

    def share(self, req: Req, launched: int | None = None) -> None:
        """Put the prompt of a request, as far as it is computed, into the prefix cache, unless it has lost it again;
        ``launched``: that many of its tokens."""
        if req.finish is None and req.row >= 0 and not req.given_back:
            self._kv.cache.insert(req, None if launched is None else self._kv.table.tokens(req.row, launched))

    # -- in flight ---------------------------------------------------------------------------------------------------

    def of(self, req: Req) -> list[tuple[ScheduleBatch, int]]:
        """Every batch in flight that holds a request, oldest first, and its index there."""
        return [(batch, index) for batch in self if (index := place_of(req, batch.reqs)) is not None]

    def hold(self, req: Req) -> bool:
        """Tell whether some batch in flight holds a request."""
        return any(place_of(req, batch.reqs) is not None for batch in self)

    def coming(self, req: Req) -> int:
        """Most tokens that batches in flight have yet to deliver to a request."""
        return sum(batch.coming(index) for batch, index in self.of(req))

    def doubtful(self, req: Req) -> int:
        """Return how many of those may not come."""
        return sum(max(batch.coming(index) - 1, 0) for batch, index in self.of(req))

    def sampled(self) -> set[int]:
        """Ids of the request objects that get a token of a batch in flight."""
        found: set[int] = set()
        for batch in self:
            silent = batch.worker.unsampled
            if silent is None:
                found.update(map(id, batch.reqs))
            else:
                found.update(id(req) for index, req in enumerate(batch.reqs) if index not in silent)
        return found

    def ending(self) -> list[Req]:
        """Return the requests that reach their output bound with a batch in flight."""
        return [
            req
            for batch in self
            for i in batch.length_stops
            if (req := batch.reqs[i]).finish is None and i not in (batch.dropped or ())
        ]

    @property
    def free_rows(self) -> int:
        """Table rows that a request may have now."""
        free = len(self._kv.table.free)
        return free - self._spare_rows + self._rows_landing if self.at_once else free

    @property
    def rows_coming(self) -> int:
        """Those that it may have only once everything has landed."""
        return 0 if self.at_once else self._rows_landing

    @property
    def _rows_landing(self) -> int:
        return sum(len(batch.release) + len(batch.release_rows) for batch in self)

    def retract(self, req: Req) -> None:
        """Give back the row of a request whose pages are gone already, once no batch reads it. The samples that batches in
        flight still bring reach it in the queue."""
        flights = self.of(req)
        for batch, index in flights:
            if self._loses:
                batch.dropped = {*(batch.dropped or ()), index}
            elif batch.coming(index):
                req.pending_token = True
                batch.late = {**(batch.late or {}), index: req}
        if flights:
            newest = flights[-1][0]
            newest.release_rows = [*newest.release_rows, req.row]
        else:
            self._kv.table.give_row(req.row)
        req.row = -1

    def release(self, req: Req, valid_tokens: int, held_tokens: int) -> None:
        """Give back the row and the pages of a request that has ended, once no batch reads them, and drop what batches in
        flight still bring it. ``valid_tokens`` of its KV are worth keeping; its pages cover ``held_tokens``."""
        flights = self.of(req)
        for batch, index in flights:
            batch.dropped = {*(batch.dropped or ()), index}
        if req.given_back:
            return  # its row comes back with the batch that holds it
        if flights:
            newest = flights[-1][0]
            newest.release = [*newest.release, (req, valid_tokens, held_tokens)]
            if self.at_once:
                if valid_tokens and not self._drafts and not self._kv.cache.names_at_once:
                    # The KV of every known token is there, or is computed by a batch before whoever reads it.
                    valid_tokens = min(held_tokens, req.kv_len + 1 - self.coming(req))
                self._give_kv_back(req, valid_tokens, held_tokens)
        else:
            self._give_back(req, valid_tokens, held_tokens)

    def ending_after(self, landed: ScheduleBatch) -> list[tuple[int, Req, ScheduleBatch]]:
        """Return the requests to which a batch that has landed brought a token, with their index there, and which stop by
        length with another one, still in flight."""
        found = []
        for batch in self:
            for req in [batch.reqs[index] for index in batch.length_stops]:
                index = place_of(req, landed.reqs)
                if index is not None and landed.coming(index) and req.finish is None and not req.given_back:
                    found.append((index, req, batch))
        return found

    def release_ending(self, req: Req, batch: ScheduleBatch) -> None:
        """Give back the KV of a request that stops by length with a batch in flight."""
        batch.release = [*batch.release, (req, req.kv_len, req.kv_len)]
        self._give_kv_back(req, req.kv_len, req.kv_len)

    # -- landing -----------------------------------------------------------------------------------------------------

    def give_late(self, batch: ScheduleBatch, output: StepOutput) -> None:
        """Hand what a batch has brought to those who were retracted while it was in flight and wait in the queue: they
        join what is prefilled again."""
        ends = np.arange(1, len(batch.reqs) + 1) if output.counts is None else output.counts.cumsum()
        for index, req in (batch.late or {}).items():
            req.pending_token = bool(self.coming(req))
            if req.finish is None:
                run = output.tokens[ends[index - 1] if index else 0 : ends[index]]
                req.tokens = np.concatenate((req.tokens, run.astype(np.int32)))
                output_len = len(req.tokens) - req.input_len
                # A first token is left at zero, to be announced like anyone's.
                req.output_len = output_len if output_len > 1 else 0

    def give_back(self, batch: ScheduleBatch) -> None:
        """Give back what waited for a batch to be processed."""
        for req, valid_tokens, held_tokens in batch.release:
            self._give_back(req, valid_tokens, held_tokens)
        if batch.release_rows:
            for row in batch.release_rows:
                self._kv.table.give_row(row)
            if not self.at_once:  # else they were to be had before
                self._slots.reopen()
        if self.at_once and self._slots.empty:
            self._slots.reopen()  # nobody is left who could give anything back

    def _give_kv_back(self, req: Req, valid_tokens: int, held_tokens: int) -> None:
        self._kv.cache.release(req, valid_tokens, held_tokens, insert=True)
        req.given_back = True
        self._slots.reopen()

    def _give_back(self, req: Req, valid_tokens: int, held_tokens: int) -> None:
        if not req.given_back:
            self._kv.cache.release(req, valid_tokens, held_tokens, insert=True)
            self._slots.reopen()
        self._kv.table.give_row(req.row)
        req.row = -1

    # -- checks ------------------------------------------------------------------------------------------------------

    def holders(self) -> list[tuple[Req, int]]:
        """Every request that holds pages only until a batch has been processed, and the tokens that they cover: it has
        ended, or reaches its output bound with that batch."""
        held = [(req, tokens) for batch in self for req, _, tokens in batch.release if not req.given_back]
        seen = {id(req) for req, _ in held}
        for batch in self:
            for i in batch.length_stops:
                req = batch.reqs[i]
                if id(req) not in seen and req.finish is None and req.row >= 0 and not req.given_back:
                    held.append((req, int(batch.worker.seq_lens[i])))
        return held
