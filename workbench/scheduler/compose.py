"""Two ways to compose a batch, one interface: ``compose(slot) -> ScheduleBatch | None``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from workbench.scheduler.admission import (
    PrefillManager,
    computed_in_batch,
    continue_prefill,
    leave_queue,
    ordered_queue,
    start_prefill,
)
from workbench.scheduler.batch import Mode, ModelWorkerBatch, NewRequest
from workbench.scheduler.decode import DecodeManager
from workbench.scheduler.policy import Policy
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import PrefillRow, ScheduleBatch
from workbench.scheduler.state import SchedulerState, Slot
from workbench.scheduler.stops import StopIds, chosen, stacked, stop_ids_of


class Composer(Protocol):
    """Decides what a slot runs next; None when it has nothing to run."""

    def compose(self, slot: Slot) -> ScheduleBatch | None: ...

    def repeated(self, slot: Slot, steps: int) -> None:
        """Note that ``steps`` decode batches like the last have been formed without asking."""


class PrefillFirst:
    """SGLang's way: prefill whenever admission allows, else decode."""

    def __init__(self, state: SchedulerState, policy: Policy) -> None:
        self.state = state
        self.prefill = PrefillManager(state, policy)
        self.decode = DecodeManager(state, newest_first=False)

    def compose(self, slot: Slot) -> ScheduleBatch | None:
        state, config, running = self.state, self.state.config, slot.running
        if state.chunked is not None or (state.waiting and not slot.full):
            starved = config.max_prefill_streak is not None and slot.prefill_streak >= config.max_prefill_streak
            if not (starved and running.count):
                batch = self._prefill(slot)
                if batch is not None:
                    return batch
        if not running.count:
            return None
        needing = running.needing_page()
        if (running.count if needing is None else len(needing)) > state.cache.available_pages:
            before = len(state.retracted)
            ready, needing = self.decode.make_room(slot)
            if not ready:
                return None
            if len(state.retracted) == before:
                state.decay_ratio()
        else:
            state.decay_ratio()
        slot.prefill_streak = 0
        return _build_decode(state, slot, needing)

    def repeated(self, slot: Slot, steps: int) -> None:
        slot.prefill_streak = 0
        self.state.decay_ratio(steps)

    def _prefill(self, slot: Slot) -> ScheduleBatch | None:
        state, running = self.state, slot.running
        # Decodes join only if each could take a page without anyone being retracted for it.
        joins = state.config.mixed_chunk and 0 < running.count <= state.cache.available_pages
        rows = self.prefill.form(slot, running.count if joins else 0)
        if not rows:
            return None
        slot.prefill_streak = 0 if joins else slot.prefill_streak + 1
        return build(state, slot, rows, joins, running.needing_page() if joins else None)


class DecodeFirstMixed:
    """vLLM v1's and Sarathi's way: one token budget, first for the running requests, then for waiting ones."""

    def __init__(self, state: SchedulerState, policy: Policy) -> None:
        self.state = state
        self.policy = policy
        self.decode = DecodeManager(state, newest_first=True)

    def compose(self, slot: Slot) -> ScheduleBatch | None:
        state, running = self.state, slot.running
        needing = None
        before = len(state.retracted)
        if running.count:
            need = running.needing_page()
            if (running.count if need is None else len(need)) > state.cache.available_pages:
                # The newest request of all is the one whose prompt is unfinished, if there is one.
                if state.chunked is not None:
                    state.retract_chunked()
                ready, needing = self.decode.make_room(slot)
                if not ready and running.count:
                    return None
            else:
                needing = need
        decodes = running.count > 0
        held = 0 if not decodes else running.count if needing is None else len(needing)
        rows: list[PrefillRow] = []
        if len(state.retracted) == before and (state.chunked is not None or state.waiting):
            rows = self._prefill(slot, max(state.config.max_batch_tokens - running.count, 0), held)
        if not decodes and not rows:
            return None
        return build(state, slot, rows, decodes, needing)

    def repeated(self, slot: Slot, steps: int) -> None:
        pass  # it keeps no account of decode steps

    def _prefill(self, slot: Slot, budget: int, held_pages: int) -> list[PrefillRow]:
        """Rows for at most ``budget`` prompt tokens, leaving ``held_pages`` pages to the decodes of this step."""
        state, cache, config = self.state, self.state.cache, self.state.config
        rows: list[PrefillRow] = []
        req = state.chunked
        if req is not None:
            end = min(len(req.tokens), req.kv_len + config.chunk_at(req.kv_len, budget))
            if end == req.kv_len:
                return []
            if end == len(req.tokens) and slot.running.count >= config.max_running_per_slot:
                return []
            if cache.pages_for(end) - cache.pages_for(req.kv_len) > cache.available_pages - held_pages:
                # Someone else holds the rest: a prompt that is alone always fits, or it would have been refused.
                state.retract_chunked()
                return []
            row = continue_prefill(state, slot, req, end)
            rows.append(row)
            budget -= row.end - row.start
            if not row.last:
                return rows
            state.chunked = None
        admitted: list[Req] = []
        for req in ordered_queue(state, self.policy) if not slot.full else ():
            if budget <= 0:
                break
            if slot.running.count + len(rows) >= config.max_running_per_slot or not state.table.free_rows:
                slot.full = True
                break
            assert not req.pending_token, "a request cannot be admitted before its last token is known"
            node, cached = cache.match(req)
            if req.passed_over < (config.max_passed_over or 1 << 62) and computed_in_batch(state, req, cached, rows):
                continue
            end = min(len(req.tokens), cached + config.chunk_at(cached, budget))
            cache.lock(node)
            if cache.pages_for(end - cached) > cache.available_pages - held_pages:
                cache.unlock(node)
                slot.full = True
                break
            row = start_prefill(state, slot, req, node, cached, end)
            rows.append(row)
            admitted.append(req)
            budget -= end - cached
            if not row.last:
                state.chunked = req
                break
        leave_queue(state, admitted)
        return rows


COMPOSERS: dict[str, Callable[[SchedulerState, Policy], Composer]] = {
    "prefill-first": PrefillFirst,
    "mixed": DecodeFirstMixed,
}


def build(
    state: SchedulerState, slot: Slot, prefill: list[PrefillRow], decodes: bool, needing: np.ndarray | None
) -> ScheduleBatch:
    """Make the batch: advance the running set if ``decodes``, add the prefilled requests to it, and freeze the arrays."""
    if not prefill:
        return _build_decode(state, slot, needing)
    running = slot.running
    rows = seq_lens = query_lens = token_at = page_rows = pages = None
    decode_stops: StopIds = None
    reqs: list[Req] = []
    stops: Sequence[int] = ()
    decode_tokens = context_tokens = 0
    if decodes:
        rows, reqs, decode_tokens, decode_stops = running.rows, running.reqs, running.count, running.stop_ids
        query_lens = running.query_lens
        page_rows = rows if needing is None else rows[needing]
        pages = state.cache.allocate(len(page_rows))
        stops = running.advance(needing, pages)
        seq_lens, token_at, context_tokens = running.lens, running.token_at, running.context_tokens
        if stops:
            running.remove(stops)
    unsampled = None
    left = 0
    mode: Mode = "mixed" if decodes else "prefill"
    new_reqs = [row.req for row in prefill]
    width = state.table.width
    numbers = [
        (req.row, row.end, req.end_len, req.row * width + row.end, row.end - row.start)
        for req, row in zip(new_reqs, prefill, strict=True)
    ]
    # One array for all of them: each of its own would cost as much.
    new_rows, new_lens, new_ends, new_at, new_queries = np.array(numbers, np.int64).T.copy()
    if rows is None or seq_lens is None or query_lens is None or token_at is None:
        rows, seq_lens, query_lens, token_at = new_rows, new_lens, new_queries, new_at
    else:
        rows, seq_lens = np.concatenate((new_rows, rows)), np.concatenate((new_lens, seq_lens))
        query_lens, token_at = np.concatenate((new_queries, query_lens)), np.concatenate((new_at, token_at))
    reqs = [*new_reqs, *reqs]
    prefill_stops = stop_ids_of(new_reqs)
    stop_ids = stacked(prefill_stops, decode_stops, len(prefill), decode_tokens)
    context_tokens += sum(row.end for row in prefill)
    prefill_tokens = sum(row.end - row.start for row in prefill)
    inputs = [row.req.tokens[row.start : row.end] for row in prefill]
    input_ids = np.concatenate(inputs) if len(inputs) > 1 else inputs[0]
    new_requests = tuple(
        NewRequest(row.req.row, row.req.rid, row.req.input_len, row.req.tokens, row.req.params)
        for row in prefill
        if row.start == row.cached
    )
    if state.chunked is not None:
        left = len(state.chunked.tokens) - state.chunked.kv_len
    if not all(row.samples for row in prefill):
        unsampled = np.array([i for i, row in enumerate(prefill) if not row.samples], np.int64)
    done = [row.req.kv_len == row.req.end_len for row in prefill]
    stops = [i for i, row in enumerate(prefill) if row.last and done[i]] + [i + len(prefill) for i in stops]
    joining = [i for i, row in enumerate(prefill) if row.last and not done[i]]
    if joining:
        # Nearly always all of them do, and a slice is the quicker index.
        at = slice(len(prefill)) if len(joining) == len(prefill) else joining
        joined, stop_ids_at = [new_reqs[i] for i in joining], chosen(prefill_stops, at)
        running.add(joined, new_rows[at], new_lens[at], new_ends[at], new_at[at], stop_ids_at)
    state.computed = new_reqs
    worker = ModelWorkerBatch(
        state.step,
        mode,
        rows,
        next(state.epochs),
        seq_lens,
        query_lens,
        len(prefill),
        len(rows) - (0 if unsampled is None else len(unsampled)),
        prefill_tokens,
        decode_tokens,
        context_tokens,
        input_ids,
        unsampled,
        new_requests,
        page_rows,
        pages,
        state.table.take_writes(),
        state.cache.used_tokens,
        len(state.waiting),
        state.table.rows - state.table.free_rows,
        left,
    )
    state.step += 1
    batch = ScheduleBatch(worker, reqs, slot.index, prefill, stops, state.retracted, token_at, stop_ids)
    state.retracted = []
    state.in_flight.append(batch)
    return batch


def _build_decode(state: SchedulerState, slot: Slot, needing: np.ndarray | None) -> ScheduleBatch:
    """A batch of decodes alone: nearly every step is one, so it does nothing that only a prefill needs."""
    running = slot.running
    cache, table = state.cache, state.table
    rows, reqs, count, stop_ids = running.rows, running.reqs, running.count, running.stop_ids
    epoch, query_lens = running.epoch, running.query_lens
    page_rows = rows if needing is None else rows[needing]
    pages = cache.allocate(count if needing is None else len(page_rows))
    stops = running.advance(needing, pages)
    # Positional: keywords would double the cost.
    worker = ModelWorkerBatch(
        state.step,
        "decode",
        rows,
        epoch,
        running.lens,
        query_lens,
        0,
        count,
        0,
        count,
        running.context_tokens,
        None,
        None,
        (),
        page_rows,
        pages,
        table.take_writes(),
        cache.used_tokens,
        len(state.waiting),
        table.rows - len(table.free),
    )
    retracted: Sequence[Req] = ()
    if state.retracted:
        retracted, state.retracted = state.retracted, []
    batch = ScheduleBatch(worker, reqs, slot.index, (), stops, retracted, running.token_at, stop_ids)
    if stops:
        running.remove(stops)
    state.step += 1
    state.in_flight.append(batch)
    return batch
