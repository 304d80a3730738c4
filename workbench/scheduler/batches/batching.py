"""The interface of batchings: the choice of what a slot runs next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from workbench.scheduler.batches.assembly import Assembly
from workbench.scheduler.batches.in_turn import InTurnMixed
from workbench.scheduler.batches.mixed import DecodeFirstMixed
from workbench.scheduler.batches.prefill_first import PrefillFirst
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.slots import Slot


class Batching(Protocol):
    """Choice of what a slot runs next."""

    def form(self, slot: Slot) -> ScheduleBatch | None:
        """The next batch of a slot; None when it has nothing to run, or must wait."""
        ...

    def decoded(self, slot: Slot, steps: int) -> None:
        """Note that ``steps`` batches of decodes alone have been formed, one after the other."""
        ...


def _mixed(config: SchedulerConfig, parts: Parts, assembly: Assembly) -> Batching:
    return (InTurnMixed if config.mixed_order == "admission" else DecodeFirstMixed)(config, parts, assembly)


BATCHINGS: dict[str, Callable[[SchedulerConfig, Parts, Assembly], Batching]] = {
    "prefill-first": PrefillFirst,
    "mixed": _mixed,
}
