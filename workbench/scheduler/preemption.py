"""Taking KV from running requests of lower priority for a waiting one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req
from workbench.scheduler.slots import Slot


class Preempts(Protocol):
    """Taking from running requests what a waiting one needs."""

    def make_room(self, req: Req, slot: Slot, total: float) -> bool:
        """Take it, if that is allowed and lets ``req`` in; whether it can be let in now. ``total`` is the KV, in tokens,
        that a new request may count on so far."""
        ...


class Preemption:
    """Retracts the least important running requests of a slot, if what they free suffices."""

    def __init__(self, config: SchedulerConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts

    def make_room(self, req: Req, slot: Slot, total: float) -> bool:
        """Take the KV of running requests of clearly lower priority, if that lets ``req`` in; whether it can be let in now.

        ``total`` is the KV, in tokens, that a new request may count on so far. The row of a victim that is in flight is free
        only after that batch: then ``req`` comes in with the next one.
        """
        threshold = self._config.preempt_threshold
        if threshold is None:
            return False
        kv, flights, estimate = self._parts.kv, self._parts.flights, self._parts.estimate
        running = slot.running
        candidates = [
            (victim.priority, -victim.seq, index, victim)
            for index, victim in enumerate(running.reqs)
            if req.priority - victim.priority >= threshold and victim.finish is None
        ]
        cached = kv.cache.measure(req).device
        need = estimate.need(req, len(req.tokens) - cached)
        rows_free = min(flights.free_rows, self._config.max_running_per_slot - running.count)
        rows_coming = flights.rows_coming
        victims: list[int] = []
        unlocked: dict[Node, int] = {}
        for _, _, index, victim in sorted(candidates, key=lambda c: c[:2]):
            if need <= total and rows_free + rows_coming > 0:
                break
            own = kv.pages_for(int(running.held_tokens[index])) - victim.shared_pages
            shared = [node for node in _path(victim.node) if node.locks == unlocked.get(node, 0) + 1]
            own += sum(len(node.pages) for node in shared)  # nobody else needs them: eviction could free them
            if own == 0 and rows_free + rows_coming > 0:
                continue  # it would lose its place for nothing
            for node in _path(victim.node):
                unlocked[node] = unlocked.get(node, 0) + 1
            if not flights.at_once and flights.hold(victim):
                rows_coming += 1
            else:
                rows_free += 1
            victims.append(index)
            total += own * kv.page_size + estimate.share(int(running.remaining[index]))
        if not victims or need > total or rows_free + rows_coming <= 0:
            return False
        for victim in running.remove(victims):
            self._parts.lifecycle.retract(victim)
        return rows_free > 0


def _path(node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = node.parent
