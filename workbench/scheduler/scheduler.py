"""The scheduler: messages in, batches out, results back in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from operator import itemgetter
from typing import Any

import numpy as np

from workbench.scheduler import messages
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.batches.batching import BATCHINGS
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import CHANGEABLE, ConfigError, SchedulerConfig
from workbench.scheduler.constrained import ends_by_grammar, masked_rows, masks_of
from workbench.scheduler.parts import parts_for
from workbench.scheduler.policy import POLICIES
from workbench.scheduler.ragged import take_runs
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.running import place_of
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.stops import stopped

_NONE: Mapping[int, Finish] = {}


@dataclass(slots=True)
class StepResult:
    """The outcome of one processed batch."""

    batch: ScheduleBatch | None
    output: StepOutput | None
    """What the batch has brought. With ``counts``, exactly the tokens that each row is given, 0 or more. Without, one a row,
    of which those of ``batch.worker.unsampled`` and ``batch.dropped`` rows mean nothing."""
    first: Sequence[Req] = ()
    """Requests that got their first token."""
    ended: Sequence[Req] = ()
    """Requests that ended, in this batch or since the last result."""
    joined: Sequence[tuple[Req, int | None, Any]] = ()
    """Requests that begin to decode, or to decode again, with KV that came from elsewhere, the token that came with it and
    that they have not been given yet, None where there is none, and its ``TokenLogprobs`` where they were asked for."""


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
        parts = self._parts = parts_for(config, clock)
        self.kv, self.slots, self.queue, self.flights = parts.kv, parts.slots, parts.queue, parts.flights
        self.lifecycle, self.estimate = parts.lifecycle, parts.estimate
        self.sessions = parts.lifecycle.sessions
        self.assembly = Assembly(config, parts)
        self.batching = BATCHINGS[config.batching](config, parts, self.assembly)
        self.paused = False
        self.held = False
        """No batch is formed: it is paused, or an update of the weights waits for those in flight."""
        self._updates: deque[messages.UpdateWeights] = deque()
        # Bound once: every look at a single-dispatch method makes a new function.
        self._handler = self._handle
        self._ragged = config.draft_tokens > 0
        self._share_at_result = config.share_prompts == "result"
        # How much of a run that has been launched will hold is not known.
        self._share_launched = config.share_launched and config.cache == "radix" and not self._ragged
        self._gives_early = config.give_back == "at_once"
        self._abort_at_result = config.abort_running == "result"
        self.aborting: dict[Req, Finish] = {}
        """Requests that end with their next token, and how."""
        self._abort_whole = config.abort_partial == "result"
        self._lingers = config.lingers
        self._overrun = config.overrun
        self._at_result = self._share_at_result or self._abort_at_result or self._overrun > 0 or self._gives_early
        """Whether there may be something to do beside the stops of a batch."""
        self._in_turn = config.batching == "mixed" and config.mixed_order == "admission"
        self._times_out = config.queue_timeout is not None or config.request_timeout is not None
        self._seq = 0
        self._fruitless = 0

    # -- in ----------------------------------------------------------------------------------------------------------

    def receive(self, inbox: Iterable[object]) -> None:
        """Handle messages in order, then timeouts. Raises TypeError for a message of an unknown type."""
        for message in inbox:
            self._handler(message)
        if self._times_out and self.queue.has_deadlines:
            for req, why in self.queue.timed_out():
                self._cut(req, Finish("aborted", why))

    @singledispatchmethod
    def _handle(self, message: object) -> None:
        raise TypeError(f"the scheduler has no handler for a message of type {type(message).__name__}")

    @_handle.register
    def _(self, message: messages.Generate) -> None:
        config = self.config
        params, prompt = message.params, message.prompt
        session = fault = None
        if message.session:
            session, prompt, fault = self.sessions.place(message)
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
            overrun=self._overrun if max_new else 0,
            grammar=message.grammar,
            pair=message.pair,
            written_tokens=message.written_tokens,
        )
        self._seq += 1
        reason = None
        if message.refused or fault is not None:
            reason = message.refused or fault
        elif message.rid in self.lifecycle.by_id:
            reason = "duplicate_id"
        elif not len(prompt):
            reason = "empty_prompt"
        elif params.max_new_tokens < 0:
            reason = "output_bound_below_zero"
        elif message.grammar is not None and self._ragged:
            reason = "grammar_with_drafts"
        else:
            reason = self.capacity.rejection(len(prompt), params.max_new_tokens)
        if reason is not None:
            self._reject(req, reason)
            return
        self._accept(req)
        if config.preempt_threshold is not None:
            self.slots.reopen()  # it may get in where those who waited could not

    @_handle.register
    def _(self, message: messages.Abort) -> None:
        req = self.lifecycle.by_id.get(message.rid)
        if req is None:
            return
        finish = Finish("aborted", message.why)
        if self._ends_with_result(req):
            self.aborting.setdefault(req, finish)
        else:
            self._cut(req, finish)

    @_handle.register
    def _(self, message: messages.Stop) -> None:
        req = self.lifecycle.by_id.get(message.rid)
        if req is not None:
            self._cut(req, Finish("stop"))
        if message.output_tokens is not None:
            self.sessions.cut(message.rid, message.output_tokens)

    @_handle.register
    def _(self, message: messages.OpenSession) -> None:
        message.tell(self.sessions.open(message.session))

    @_handle.register
    def _(self, message: messages.CloseSession) -> None:
        message.tell(self.sessions.close(message.session))

    @_handle.register
    def _(self, message: messages.FlushCache) -> None:
        self.kv.flush()

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
        self._take(config)
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

    # What instances that prefill or decode alone do otherwise (workbench/scheduler/disaggregated):

    def _accept(self, req: Req) -> None:
        """Take in a request that can be served."""
        self.lifecycle.accept(req)

    def _reject(self, req: Req, reason: str) -> None:
        """Refuse a request that can never be served."""
        self.lifecycle.reject(req, reason)

    def _ends_with_result(self, req: Req) -> bool:
        """Tell whether an abort ends a request with the result of its next step, and not at once."""
        return self._abort_at_result and req.row >= 0 and (self._abort_whole or req not in self.slots.partial)

    def _cut(self, req: Req, finish: Finish) -> None:
        """End a request between batches, wherever it is."""
        self.lifecycle.cut(req, finish)

    def _conclude(self, req: Req, finish: Finish, valid_tokens: int, held_tokens: int) -> None:
        """A request has got its last token: end it, of whose KV ``valid_tokens`` are worth keeping."""
        self.lifecycle.end(req, finish, valid_tokens, held_tokens)

    def _held_aside(self) -> list[tuple[Req, int]]:
        """List who holds KV and is in no slot nor batch, and the tokens that their pages cover."""
        return []

    def snapshot(self) -> dict[str, Any]:
        """Return how the scheduler stands: counts, tokens of KV, and the settings that may be changed."""
        kv = self.kv
        return {
            "paused": self.paused,
            "step": self.assembly.step,
            "waiting": len(self.queue),
            "running": self.slots.running_count,
            "prefilling": len(self.slots.partial),
            "batches_in_flight": len(self.flights),
            "sessions": len(self.sessions),
            "kv_tokens": self.capacity.kv_tokens,
            "kv_used_tokens": kv.used_tokens,
            "kv_cached_tokens": kv.cached_tokens,
            "new_token_ratio": round(self.estimate.new_token_ratio, 6),
            "settings": {name: getattr(self.config, name) for name in CHANGEABLE},
        }

    def _take(self, config: SchedulerConfig) -> None:
        """Go on under other settings (:meth:`SchedulerConfig.changed`): whoever was turned away is looked at again."""
        self.queue.take_config(config)
        self.batching = BATCHINGS[config.batching](config, self._parts, self.assembly)
        if config.conservativeness != self.config.conservativeness:
            self.estimate.scale(config.conservativeness)
        self.config = config
        self.slots.reopen()

    # -- out ---------------------------------------------------------------------------------------------------------

    def next_batch(self, slot: int = 0) -> ScheduleBatch | None:
        """Form the next batch of a slot, or None when it has nothing to run."""
        if self.held and not self._let_go():
            return None
        flights = self.flights
        if flights.computed:
            flights.share_computed()
        batch = self.batching.form(self.slots[slot])
        if batch is not None and self.lifecycle.constrained:
            batch.worker = batch.worker._replace(masked=masked_rows(batch))
        if batch is not None or flights or self.idle:
            self._fruitless = 0
        else:
            # Ending or retracting a request may take a step of its own; more in a row would be for ever.
            self._fruitless += 1
            assert self._fruitless <= 4 * self.config.slots, "requests wait, nothing runs and nothing can be formed"
        return batch

    def _let_go(self) -> bool:
        """Do the updates that wait, if nothing is in flight; whether batches may be formed now."""
        if self._updates and not self.flights:
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
        self.lifecycle.forget_kv()
        message.write()
        message.tell(None)

    def masks(self, batch: ScheduleBatch) -> np.ndarray | None:
        """Return what each of ``batch.worker.masked`` may sample, as ``Backend.sample`` takes it: asked once what decides
        it has been processed."""
        return masks_of(batch)

    def process(self, batch: ScheduleBatch, output: StepOutput) -> StepResult:
        """Take the output of the oldest batch in flight: one token a row, or where tokens are drafted a run of them.

        Order of the checks, as everywhere: abort, length, grammar, stop ids. What ends gives back its KV once no other
        batch in flight reads it.
        """
        oldest = self.flights.popleft()
        assert oldest is batch, "batches are processed in the order in which they were formed"
        hits: Sequence[int]
        if self._ragged:
            output, length_stops, hits, valid = take_runs(batch, output, self.slots[batch.slot].running, self.kv.table)
        else:
            tokens, unsampled = output.tokens, batch.worker.unsampled
            length_stops, hits, valid = batch.length_stops, stopped(batch.stop_ids, tokens), batch.worker.seq_lens
            if unsampled is None:
                self.kv.table.add_tokens(batch.token_at, tokens)
            else:
                sampled = np.ones(len(tokens), bool)
                sampled[unsampled] = False
                self.kv.table.add_tokens(batch.token_at[sampled], tokens[sampled])
                hits = [i for i in hits if sampled[i]]
        result = StepResult(batch, output)
        if batch.late:
            self.flights.give_late(batch, output)
        if batch.prefill:
            lost = batch.dropped or ()
            for i, row in enumerate(batch.prefill):
                req = row.req
                if row.samples and req.output_len == 0 and req.finish is None and i not in lost:
                    req.output_len = 1
                    result.first = [*result.first, req]
        ends = _NONE if batch.worker.masked is None else ends_by_grammar(batch, output.tokens)
        if length_stops or hits or ends or self._at_result:
            self._finish(result, batch, length_stops, ends, hits, valid)
        if batch.release or batch.release_rows:
            self.flights.give_back(batch)
        if self.lifecycle.ended:
            result.ended = [*result.ended, *self.take_ended()]
        return result

    def _finish(
        self,
        result: StepResult,
        batch: ScheduleBatch,
        length_stops: Sequence[int],
        grammar_ends: Mapping[int, Finish],
        hits: Sequence[int],
        valid_tokens: np.ndarray,
    ) -> None:
        """End the requests of these rows, whose KV is worth keeping as far as int64[n] ``valid_tokens``, and those that
        were to end with their next token. Those that end with a batch in flight give theirs back, if that is the rule."""
        running = self.slots[batch.slot].running
        early = self.flights.ending_after(batch) if self._gives_early else ()
        if self._overrun:
            length_stops = [
                i
                for i, (req, tokens) in enumerate(zip(batch.reqs, valid_tokens.tolist(), strict=True))
                if tokens == req.end_len - req.overrun and (batch.coming(i) or not req.overrun)
            ]
        ending: dict[int, Finish] = {**grammar_ends, **{i: Finish("length") for i in length_stops}}
        for i in hits:
            ending.setdefault(i, Finish("stop"))
        if self.aborting:
            for i, req in enumerate(batch.reqs):
                if req in self.aborting and batch.coming(i) and i not in (batch.dropped or ()):
                    ending[i] = self.aborting[req]
        leaving: list[int] = []
        done: list[tuple[int, Req]] = []
        order = sorted(ending, key=lambda i: batch.reqs[i].turn) if self._in_turn else sorted(ending)
        for i in order:
            req = batch.reqs[i]
            if req.finish is not None or (batch.dropped and i in batch.dropped):
                continue
            done.append((i, req))
            if req.row < 0:
                self.queue.remove([req])
                continue
            index = place_of(req, running.reqs)
            if index is not None:
                leaving.append(index)
        if leaving:
            running.remove(leaving)
        turns = done
        landing: dict[int, ScheduleBatch] = {}
        if early:
            landing = {i: held_by for i, _, held_by in early if i not in ending}
            turns = sorted([*done, *((i, batch.reqs[i]) for i in landing)], key=itemgetter(0))
        shared = 0
        for i, req in turns:
            if self._share_at_result:
                shared = self._share(batch, shared, i)
            if i in landing:
                self.flights.release_ending(req, landing[i])
                continue
            valid = int(valid_tokens[i])
            req.output_len = req.output_at(valid)
            self._conclude(req, ending[i], valid, req.kv_len + req.spare_tokens)
        if self._share_at_result:
            self._share(batch, shared, len(batch.prefill))
        if self._lingers and done:
            self.slots[batch.slot].linger(batch, [req for _, req in done])
        if self.aborting:
            self.aborting = {req: finish for req, finish in self.aborting.items() if req.finish is None}
        result.ended = [req for _, req in done if req.finish is not None]

    def _share(self, batch: ScheduleBatch, first: int, end: int) -> int:
        """Share the complete prompts of a batch from index ``first`` to ``end``; returns where to go on."""
        for row in batch.prefill[first:end]:
            if row.last:
                self.flights.share(row.req, self._launched(row) if self._share_launched else None)
        return max(end, first)

    def _launched(self, row: PrefillRow) -> int:
        """Return how far the KV of a request, whose complete prompt has landed, is launched and its tokens are known."""
        running = self.slots[row.req.slot].running
        index = place_of(row.req, running.reqs)
        return row.end if index is None else min(int(running.lens[index]), row.end + 1)

    def take_ended(self) -> list[Req]:
        """Requests that ended outside the processing of a batch, since the last call."""
        return self.lifecycle.take_ended()

    # -- at rest -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing to do before a message comes."""
        if self.flights or (self.queue.waiting and not self.paused) or self._updates:
            return False
        return self.slots.empty

    def rest(self) -> None:
        """Take a rest when idle: nothing may be lost by now, and expectations start afresh."""
        self.flights.share_computed()
        if not self.paused:
            self.kv.check_rest()
        self.estimate.reset()

    def check(self) -> None:
        """Assert that every page has exactly one owner. For tests: it walks everything."""
        held = [*self.slots.holders(), *self._held_aside()]
        running = {id(req) for req, _ in held}
        self.kv.check([*held, *(one for one in self.flights.holders() if id(one[0]) not in running)])
