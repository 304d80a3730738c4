"""Taking requests from the queue into a prefill."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from workbench.scheduler.kv.radix import Node
from workbench.scheduler.policy import Policy, check_permutation
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import PrefillRow
from workbench.scheduler.state import OUTPUT_ESTIMATE_LIMIT, SchedulerState, Slot, remove_from

_LIMIT = np.array(OUTPUT_ESTIMATE_LIMIT)


def ordered_queue(state: SchedulerState, policy: Policy) -> list[Req]:
    """The waiting queue in order of service: those passed over too often first, the rest as the policy says."""
    waiting = state.waiting
    if type(policy) is Policy:
        return list(waiting)
    limit = state.config.max_passed_over
    overdue = [] if limit is None else [req for req in waiting if req.passed_over >= limit]
    if overdue:
        waiting = [req for req in waiting if req.passed_over < limit]  # type: ignore[operator]
    ordered = policy.order(list(waiting), state.view())
    check_permutation(ordered, waiting, policy)
    return overdue + ordered


def output_estimate(req: Req) -> int:
    """Tokens admission expects a request still to write, at most."""
    return min(req.max_new - req.output_len, OUTPUT_ESTIMATE_LIMIT)


def reserved_tokens(state: SchedulerState) -> int:
    """KV that the running requests are expected to need yet."""
    expected = 0
    for slot in state.slots:
        if slot.running.count:
            expected += sum(np.minimum(slot.running.remaining, _LIMIT).tolist())
    return math.ceil(expected * state.new_token_ratio)


def start_prefill(state: SchedulerState, slot: Slot, req: Req, node: Node | None, cached: int, end: int) -> PrefillRow:
    """Give a request, whose prefix ``node`` is locked, a row and pages for its tokens up to ``end``."""
    size = state.config.page_size
    req.row = row = state.table.take_row()
    req.slot = slot.index
    req.node = node
    req.shared_pages = cached // size
    state.table.write_tokens(row, req.tokens)
    new = state.cache.allocate(state.cache.pages_for(end) - req.shared_pages)
    state.table.write_pages(row, 0, np.concatenate((state.cache.tree.path_pages(node), new)) if cached else new)
    if not req.scheduled:
        req.scheduled = True
        req.cached_tokens = cached
    req.kv_len = end
    return PrefillRow(req, cached, end, cached)


def continue_prefill(state: SchedulerState, slot: Slot, req: Req, end: int) -> PrefillRow:
    """The next chunk of a request that has a row: pages for its tokens up to ``end``."""
    start = req.kv_len
    have = state.cache.pages_for(start)
    more = state.cache.pages_for(end) - have
    if more:
        state.table.write_pages(req.row, have, state.cache.allocate(more))
    req.slot = slot.index
    req.kv_len = end
    return PrefillRow(req, start, end, 0)


def computed_in_batch(state: SchedulerState, req: Req, cached: int, rows: list[PrefillRow]) -> bool:
    """Whether this batch already computes enough of a request's prompt that waiting for it pays."""
    threshold = state.config.share_in_batch_tokens
    if threshold is None or not state.cache.enabled:
        return False
    size = state.config.page_size
    shared = -(-(cached + threshold) // size) * size
    if shared >= len(req.tokens):
        return False
    for row in rows:
        other = row.req.tokens
        if (
            row.end >= shared
            and row.req.namespace == req.namespace
            and other[cached] == req.tokens[cached]
            and np.array_equal(other[:shared], req.tokens[:shared])
        ):
            return True
    return False


def leave_queue(state: SchedulerState, admitted: list[Req]) -> None:
    """Take the admitted out of the queue and count, for the others, that a later arrival went before them."""
    if not admitted:
        return
    newest = max(req.seq for req in admitted)
    remove_from(state.waiting, admitted)
    for req in state.waiting:
        if req.seq > newest:
            break
        req.passed_over += 1


class PrefillManager:
    """Forms the prefill part of a prefill-first batch under its budgets: KV, prompt tokens, chunk, rows."""

    def __init__(self, state: SchedulerState, policy: Policy) -> None:
        self.state = state
        self.policy = policy

    def form(self, slot: Slot, decode_rows: int = 0) -> list[PrefillRow]:
        """The prefill rows of the next batch, empty when none can be formed.

        ``decode_rows`` decodes will share the batch and its token budgets.
        """
        state = self.state
        if state.chunked is None and (slot.full or not state.waiting):
            return []
        budget = _Budget(state, decode_rows)
        rows: list[PrefillRow] = []
        if state.chunked is not None:
            row = self._next_chunk(slot, budget)
            if row is None:
                return []
            rows.append(row)
            if not row.last:
                return rows
            state.chunked = None
        if not slot.full and state.waiting:
            self._admit_waiting(slot, budget, rows)
        return rows

    def _next_chunk(self, slot: Slot, budget: _Budget) -> PrefillRow | None:
        state = self.state
        req = state.chunked
        assert req is not None
        size = state.config.page_size
        end = len(req.tokens)
        if budget.chunk is not None:
            end = min(end, req.kv_len + state.config.chunk_at(req.kv_len, budget.chunk))
        end = min(end, (state.cache.pages_for(req.kv_len) + state.cache.available_pages - budget.held_pages) * size)
        if end < len(req.tokens):
            end = end // size * size
        elif slot.running.count >= state.config.max_running_per_slot:
            return None  # its last chunk must land in a slot with room: another one has it
        if end <= req.kv_len:
            return None
        row = continue_prefill(state, slot, req, end)
        budget.spend(row, output_estimate(req) if row.last else 0)
        return row

    def _admit_waiting(self, slot: Slot, budget: _Budget, rows: list[PrefillRow]) -> None:
        state = self.state
        admitted: list[Req] = []
        for req in ordered_queue(state, self.policy):
            crowded = slot.running.count + len(rows) >= state.config.max_running_per_slot or not state.table.free_rows
            if crowded and (rows or not self._preempt_for(req, slot, budget)):
                slot.full = True
                break
            verdict = self._admit(req, slot, budget, rows)
            if verdict == "no_kv" and not rows and self._preempt_for(req, slot, budget):
                verdict = self._admit(req, slot, budget, rows)
            if verdict == "later":
                continue
            if verdict == "no_kv":
                slot.full = True
            if verdict in ("no_kv", "no_budget"):
                break
            admitted.append(req)
            if verdict == "chunked":
                break
        leave_queue(state, admitted)

    def _admit(self, req: Req, slot: Slot, budget: _Budget, rows: list[PrefillRow]) -> str:
        state, config, cache = self.state, self.state.config, self.state.cache
        assert not req.pending_token, "a request cannot be admitted before its last token is known"
        node, cached = cache.match(req)
        if req.passed_over < (config.max_passed_over or 1 << 62) and computed_in_batch(state, req, cached, rows):
            return "later"
        extend = len(req.tokens) - cached
        estimate = output_estimate(req)
        need = cache.pages_for(extend + estimate) * config.page_size
        alone = state.alone and not rows
        if not alone and need >= budget.total():
            return "no_kv"
        cache.lock(node)
        # Locking the prefix may have taken what eviction could have freed: look again.
        if (not alone and need >= budget.total()) or cache.pages_for(
            extend
        ) > cache.available_pages - budget.held_pages:
            cache.unlock(node)
            return "no_kv"
        end = len(req.tokens)
        if rows and extend > budget.prompt:
            cache.unlock(node)
            return "no_budget"
        chunk = None if budget.chunk is None else config.chunk_at(cached, budget.chunk)
        if chunk is not None and extend > chunk:
            end = cached + chunk // config.page_size * config.page_size
            if end == cached:
                cache.unlock(node)
                return "no_budget"
        row = start_prefill(state, slot, req, node, cached, end)
        rows.append(row)
        budget.spend(row, estimate if row.last else 0)
        if row.last:
            return "whole"
        state.chunked = req
        return "chunked"

    def _preempt_for(self, req: Req, slot: Slot, budget: _Budget) -> bool:
        """Take the KV of running requests of clearly lower priority, if that lets ``req`` in; whether it can be let in now.
        The row of one that is in flight is free only after that batch: then ``req`` comes in with the next one."""
        state = self.state
        threshold = state.config.preempt_threshold
        if threshold is None:
            return False
        running = slot.running
        candidates = [
            (victim.priority, -victim.seq, index, victim)
            for index, victim in enumerate(running.reqs)
            if req.priority - victim.priority >= threshold and victim.finish is None
        ]
        _, cached = state.cache.measure(req)
        need = state.cache.pages_for(len(req.tokens) - cached + output_estimate(req)) * state.config.page_size
        total = budget.total()
        rows_free = min(state.table.free_rows, state.config.max_running_per_slot - running.count)
        rows_coming = sum(len(batch.release) + len(batch.release_rows) for batch in state.in_flight)
        victims: list[int] = []
        unlocked: dict[Node, int] = {}
        for _, _, index, victim in sorted(candidates, key=lambda c: c[:2]):
            if need < total and rows_free + rows_coming > 0:
                break
            own = state.cache.pages_for(int(running.lens[index])) - victim.shared_pages
            shared = [node for node in _path(victim.node) if node.locks == unlocked.get(node, 0) + 1]
            own += sum(len(node.pages) for node in shared)  # nobody else needs them: eviction could free them
            if own == 0 and rows_free + rows_coming > 0:
                continue  # it would lose its place for nothing
            for node in _path(victim.node):
                unlocked[node] = unlocked.get(node, 0) + 1
            if state.last_flight(victim) is None:
                rows_free += 1
            else:
                rows_coming += 1
            victims.append(index)
            expected = min(int(running.remaining[index]), OUTPUT_ESTIMATE_LIMIT) * state.new_token_ratio
            total += own * state.config.page_size + int(expected)
        if not victims or need >= total or rows_free + rows_coming <= 0:
            return False
        for victim in running.remove(victims):
            state.retract(victim, victim.kv_len)
        budget.reserved = reserved_tokens(state)
        return rows_free > 0


def _path(node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = node.parent


class _Budget:
    """What is left of a prefill batch's budgets, in tokens."""

    def __init__(self, state: SchedulerState, decode_rows: int) -> None:
        config = state.config
        self._cache = state.cache
        self._size = config.page_size
        # A decode takes a token of the budgets, and in the worst case a page of the pool.
        self.held_pages = decode_rows
        self.prompt = config.max_prefill_tokens - decode_rows
        self.chunk = None if config.chunk is None else max(config.chunk - decode_rows, 0)
        self.reserved = reserved_tokens(state)

    def total(self) -> int:
        """KV that a new request may count on."""
        return (self._cache.available_pages - self.held_pages) * self._size - self.reserved

    def spend(self, row: PrefillRow, output_tokens: int) -> None:
        tokens = row.end - row.start
        self.prompt -= tokens
        if self.chunk is not None:
            self.chunk -= tokens
        self.reserved += output_tokens
