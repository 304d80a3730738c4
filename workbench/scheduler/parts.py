"""The owners of the scheduler's state, put together. Each is written by its own methods alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.estimate import OutputEstimate
from workbench.scheduler.flights import Flights
from workbench.scheduler.kv.memory import KVMemory
from workbench.scheduler.lifecycle import Lifecycle
from workbench.scheduler.queue import WaitingQueue
from workbench.scheduler.slots import Slots


@dataclass(frozen=True, slots=True)
class Parts:
    """The owners of the scheduler's state."""

    kv: KVMemory
    """Pages, rows and the prefix cache."""
    slots: Slots
    """Requests that hold KV."""
    queue: WaitingQueue
    """Requests that wait for it."""
    flights: Flights
    """Batches formed and not yet processed."""
    lifecycle: Lifecycle
    """Requests by id, and how they leave."""
    estimate: OutputEstimate
    """How much running requests will yet write."""


def parts_for(config: SchedulerConfig, clock: Callable[[], float]) -> Parts:
    """A scheduler's parts, all empty."""
    kv = KVMemory(config)
    slots = Slots(config, kv.table)
    queue = WaitingQueue(config, kv.cache, clock)
    flights = Flights(config, kv, slots)
    lifecycle = Lifecycle(kv, slots, queue, flights, keep_aborted=config.aborted_kv == "keep")
    return Parts(kv, slots, queue, flights, lifecycle, OutputEstimate(config, slots, flights))
