"""The scheduler: messages in, batches out, results back in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any

import numpy as np

from workbench.scheduler import messages
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.compose import COMPOSERS
from workbench.scheduler.config import CHANGEABLE, ConfigError, SchedulerConfig
from workbench.scheduler.policy import POLICIES, load_policy
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.running import place_of
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.state import SchedulerState, remove_from
from workbench.scheduler.stops import stopped


@dataclass(slots=True)
class StepResult:
    """What one processed batch has brought."""

    batch: ScheduleBatch | None
    output: StepOutput | None
    """What the batch has sampled; the tokens of ``batch.worker.unsampled`` and ``batch.dropped`` rows mean nothing."""
    first: Sequence[Req] = ()
    """Requests that got their first token."""
    ended: Sequence[Req] = ()
    """Requests that ended, in this batch or since the last result."""


class Scheduler:
    """The state machine between an inbox and a backend. It neither waits nor knows what time is, beside ``clock``.

    A loop calls, in its own order, :meth:`receive`, :meth:`next_batch` and, for every batch once and in order,
    :meth:`process`. Several batches may be formed before the first is processed.
    """

    def __init__(
        self, config: SchedulerConfig, *, eos_token_ids: tuple[int, ...] = (), clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.config = self._first = config
        self.eos_token_ids = eos_token_ids
        self.capacity = Capacity.of(config)
        self.state = SchedulerState(config, clock)
        self.composer = COMPOSERS[config.batching](self.state, load_policy(config.policy))
        self.paused = False
        self.held = False
        """No batch is formed: it is paused, or an update of the weights waits for those in flight."""
        self._updates: deque[messages.UpdateWeights] = deque()
        # Bound once: every look at a single-dispatch method makes a new function.
        self._handler = self._handle
        self._seq = 0
        self._fruitless = 0
        self._queue_deadlines: deque[Req] = deque()
        self._deadlines: deque[Req] = deque()

    # -- in ----------------------------------------------------------------------------------------------------------

    def receive(self, inbox: Iterable[object]) -> None:
        """Handle messages in order, then timeouts. Raises TypeError for a message of an unknown type."""
        for message in inbox:
            self._handler(message)
        if self._queue_deadlines or self._deadlines:
            self._time_out()

    @singledispatchmethod
    def _handle(self, message: object) -> None:
        raise TypeError(f"the scheduler has no handler for a message of type {type(message).__name__}")

    @_handle.register
    def _(self, message: messages.Generate) -> None:
        config, state = self.config, self.state
        params, prompt = message.params, message.prompt
        session = fault = None
        if message.session:
            session, prompt, fault = state.sessions.place(message)
        stop_ids = () if params.ignore_eos else self.eos_token_ids
        if params.stop_token_ids and not params.ignore_eos:
            # Tokens are int32: an id beyond that is never sampled, and would not fit the arrays of stop ids.
            stop_ids = (*stop_ids, *(i for i in params.stop_token_ids if abs(i) < 1 << 31))
        max_new = self.capacity.output_bound(len(prompt), params.max_new_tokens)
        due_s = float("inf") if message.slo_ttft_s is None else message.arrival_s + message.slo_ttft_s
        req = Req(
            message.rid,
            prompt,
            params,
            max_new,
            self._seq,
            message.arrival_s,
            message.priority,
            message.namespace,
            due_s,
            stop_ids,
            prompt,
            session=session,
        )
        self._seq += 1
        reason = None
        if fault is not None:
            reason = fault
        elif message.rid in state.by_id:
            reason = "duplicate_id"
        elif not len(prompt):
            reason = "empty_prompt"
        elif params.max_new_tokens < 0:
            reason = "output_bound_below_zero"
        else:
            reason = self.capacity.rejection(len(prompt), params.max_new_tokens)
        if reason is not None:
            req.finish = Finish("rejected", reason)
            state.ended.append(req)
            return
        if session is not None:
            session.busy = True
        state.by_id[req.rid] = req
        state.enqueue(req)
        if config.queue_timeout is not None:
            self._queue_deadlines.append(req)
        if config.request_timeout is not None:
            self._deadlines.append(req)

    @_handle.register
    def _(self, message: messages.Abort) -> None:
        req = self.state.by_id.get(message.rid)
        if req is not None:
            self._cut(req, Finish("aborted", message.why))

    @_handle.register
    def _(self, message: messages.Stop) -> None:
        req = self.state.by_id.get(message.rid)
        if req is not None:
            self._cut(req, Finish("stop"))
        if message.output_tokens is not None:
            self.state.sessions.cut(message.rid, message.output_tokens)

    @_handle.register
    def _(self, message: messages.OpenSession) -> None:
        message.tell(self.state.sessions.open(message.session))

    @_handle.register
    def _(self, message: messages.CloseSession) -> None:
        message.tell(self.state.sessions.close(message.session))

    @_handle.register
    def _(self, message: messages.FlushCache) -> None:
        self.state.cache.flush()

    @_handle.register
    def _(self, message: messages.Pause) -> None:
        self.paused = self.held = True

    @_handle.register
    def _(self, message: messages.Resume) -> None:
        self.paused = False
        self.held = bool(self._updates)

    @_handle.register
    def _(self, message: messages.GetState) -> None:
        message.tell(self.snapshot())

    @_handle.register
    def _(self, message: messages.SetState) -> None:
        policy = message.settings.get("policy", self.config.policy)
        try:
            config = self.config.changed(message.settings, self._first)
            if policy not in (self.config.policy, self._first.policy, *POLICIES):
                # A message may come from anywhere, and must not name code to run.
                raise ConfigError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}")
        except ConfigError as error:
            message.tell(str(error))
            return
        if config.policy != self.config.policy:
            self.composer = COMPOSERS[config.batching](self.state, load_policy(config.policy))
        self.config = config
        self.state.take_config(config)
        message.tell(None)

    @_handle.register
    def _(self, message: messages.UpdateWeights) -> None:
        self._updates.append(message)
        self.held = True

    @_handle.register
    def _(self, message: messages.Profile) -> None:
        try:
            message.act()
        except ValueError as error:
            message.tell(str(error))
        else:
            message.tell(None)

    def snapshot(self) -> dict[str, Any]:
        """How the scheduler stands: counts, tokens of KV, and the settings that may be changed."""
        state, size = self.state, self.config.page_size
        return {
            "paused": self.paused,
            "step": state.step,
            "waiting": len(state.waiting),
            "running": state.running_count,
            "prefilling": int(state.chunked is not None),
            "batches_in_flight": len(state.in_flight),
            "sessions": len(state.sessions),
            "kv_tokens": self.config.pages * size,
            "kv_used_tokens": state.cache.used_tokens,
            "kv_cached_tokens": state.cache.tree.evictable_pages * size,
            "new_token_ratio": round(state.new_token_ratio, 6),
            "settings": {name: getattr(self.config, name) for name in CHANGEABLE},
        }

    def _cut(self, req: Req, finish: Finish) -> None:
        """End a request between batches, wherever it is."""
        state = self.state
        if req.row < 0:
            remove_from(state.waiting, [req])
            state.end(req, finish)
        else:
            running = state.slots[req.slot].running
            index = place_of(req, running.reqs)
            if index is not None:
                running.remove([index])
            if req is state.chunked:
                state.chunked = None
            else:
                # Every computed token after the prompt was an output, and so is the last sample, unless still in flight.
                req.output_len = req.output_at(req.kv_len) - state.samples_in_flight(req)
            state.end(req, finish, req.kv_len, req.kv_len)
        state.ended.append(req)

    def _time_out(self) -> None:
        now = self.state.clock()
        for queue, limit_s, why, unscheduled_only in (
            (self._queue_deadlines, self.config.queue_timeout, "queue_timeout", True),
            (self._deadlines, self.config.request_timeout, "request_timeout", False),
        ):
            while queue and (queue[0].finish is not None or now - queue[0].arrival_s >= (limit_s or 0.0)):
                req = queue.popleft()
                if req.finish is None and not (unscheduled_only and req.scheduled):
                    self._cut(req, Finish("aborted", why))

    # -- out ---------------------------------------------------------------------------------------------------------

    def next_batch(self, slot: int = 0) -> ScheduleBatch | None:
        """Form the next batch of a slot, or None when it has nothing to run."""
        state = self.state
        if self.held and not self._let_go():
            return None
        if state.computed:
            state.insert_computed()
        batch = self.composer.compose(state.slots[slot])
        if batch is not None or state.in_flight or self.idle:
            self._fruitless = 0
        else:
            # Ending or retracting a request may take a step of its own; more in a row would be for ever.
            self._fruitless += 1
            assert self._fruitless <= 4 * self.config.slots, "requests wait, nothing runs and nothing can be formed"
        return batch

    def _let_go(self) -> bool:
        """Do the updates that wait, if nothing is in flight; whether batches may be formed now."""
        if self._updates and not self.state.in_flight:
            while self._updates:
                self._update(self._updates.popleft())
            self.held = self.paused
        return not self.held

    def _update(self, message: messages.UpdateWeights) -> None:
        try:
            message.check()
        except ValueError as error:
            message.tell(str(error))
            return
        self.state.forget_kv()
        message.write()
        message.tell(None)

    def process(self, batch: ScheduleBatch, output: StepOutput) -> StepResult:
        """Take the output of the oldest batch in flight, which has one token a row.

        Order of the checks, as everywhere: abort, length, stop ids. What ends gives back its KV once no other batch in
        flight reads it.
        """
        state = self.state
        assert state.in_flight[0] is batch, "batches are processed in the order in which they were formed"
        state.in_flight.popleft()
        tokens, unsampled = output.tokens, batch.worker.unsampled
        hits = stopped(batch.stop_ids, tokens)
        if unsampled is None:
            state.table.add_tokens(batch.token_at, tokens)
        else:
            sampled = np.ones(len(tokens), bool)
            sampled[unsampled] = False
            state.table.add_tokens(batch.token_at[sampled], tokens[sampled])
            hits = [i for i in hits if sampled[i]]
        result = StepResult(batch, output)
        if batch.late:
            self._give_late_tokens(batch, tokens)
        for row in batch.prefill:
            req = row.req
            if row.samples and req.output_len == 0 and req.finish is None:
                req.output_len = 1
                result.first = [*result.first, req]
        if batch.length_stops or hits:
            self._finish(batch, hits, result)
        if batch.release:
            for req, valid, held in batch.release:
                state.give_back(req, valid, held)
        if batch.release_rows:
            for row_index in batch.release_rows:
                state.table.give_row(row_index)
            state.memory_freed()
        if state.ended:
            result.ended = [*result.ended, *self.take_ended()]
        return result

    def _give_late_tokens(self, batch: ScheduleBatch, tokens: np.ndarray) -> None:
        """A request retracted while this batch was in flight waits in the queue: its token joins what it re-prefills."""
        for index, req in (batch.late or {}).items():
            req.pending_token = False
            if req.finish is None:
                req.tokens = np.append(req.tokens, np.int32(tokens[index]))
                output_len = len(req.tokens) - req.input_len
                # A first token is left at zero for `process` to announce it like anyone's.
                req.output_len = output_len if output_len > 1 else 0

    def _finish(self, batch: ScheduleBatch, hits: Sequence[int], result: StepResult) -> None:
        state = self.state
        running = state.slots[batch.slot].running
        ending: dict[int, Finish] = {i: Finish("length") for i in batch.length_stops}
        for i in hits:
            ending.setdefault(i, Finish("stop"))
        leaving: list[int] = []
        done: list[tuple[int, Req]] = []
        for i in sorted(ending):
            req = batch.reqs[i]
            if req.finish is not None:
                continue
            done.append((i, req))
            if req.row < 0:
                remove_from(state.waiting, [req])
                continue
            index = place_of(req, running.reqs)
            if index is not None:
                leaving.append(index)
        if leaving:
            running.remove(leaving)
        for i, req in done:
            valid = int(batch.worker.seq_lens[i])
            req.output_len = req.output_at(valid)
            state.end(req, ending[i], valid, req.kv_len)
        result.ended = [req for _, req in done]

    def take_ended(self) -> list[Req]:
        """Requests that ended outside the processing of a batch, since the last call."""
        ended, self.state.ended = self.state.ended, []
        return ended

    @property
    def has_deadlines(self) -> bool:
        """Some request may time out."""
        return bool(self._queue_deadlines or self._deadlines)

    # -- at rest -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing to do before a message comes."""
        state = self.state
        if state.in_flight or state.chunked is not None:
            return False
        return (
            (self.paused or not state.waiting)
            and not any(slot.running.count for slot in state.slots)
            and not self._updates
        )

    def rest(self) -> None:
        """Called when idle: nothing may be lost by now, and expectations start afresh."""
        state = self.state
        state.insert_computed()
        if not self.paused:
            assert state.cache.available_pages == state.cache.pool.total, "KV pages are missing at rest"
            assert state.table.free_rows == state.table.rows, "table rows are missing at rest"
        state.reset_ratio()

    def check(self) -> None:
        """Assert that every page has exactly one owner. For tests: it walks everything."""
        state = self.state
        size = self.config.page_size
        owners = [state.cache.pool.free_pages()]
        owners += [node.pages for node in state.cache.tree.nodes()]
        holders: list[tuple[Req, int]] = []
        for slot in state.slots:
            holders += [(req, int(n)) for req, n in zip(slot.running.reqs, slot.running.lens, strict=True)]
        if state.chunked is not None:
            holders.append((state.chunked, state.chunked.kv_len))
        seen = {id(req) for req, _ in holders}
        for batch in state.in_flight:
            holders += [(req, held) for req, _, held in batch.release]
            seen |= {id(req) for req, _, _ in batch.release}
            for i in batch.length_stops:
                if id(batch.reqs[i]) not in seen and batch.reqs[i].finish is None and batch.reqs[i].row >= 0:
                    holders.append((batch.reqs[i], int(batch.worker.seq_lens[i])))
        for req, held in holders:
            owners.append(state.table.pages(req.row, req.shared_pages, -(-held // size)))
        pages = np.concatenate(owners)
        assert len(pages) == state.cache.pool.total, f"{len(pages)} of {state.cache.pool.total} pages have an owner"
        assert len(np.unique(pages)) == len(pages), "a page has two owners"
        unlocked = sum(len(node.pages) for node in state.cache.tree.nodes() if not node.locks)
        assert unlocked == state.cache.tree.evictable_pages, "evictable pages are miscounted"
