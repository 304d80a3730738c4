"""What the budgets of a prefill have in common, however they charge a prompt (``charge``)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.preemption import Preempts
from workbench.scheduler.request import Req
from workbench.scheduler.slots import Slot


class PrefillBudget(ABC):
    """The rest of a batch's budgets: KV, prompt tokens, chunk. The running requests share them if they join, with
    ``decode_tokens``."""

    def __init__(
        self, config: SchedulerConfig, parts: Parts, preemption: Preempts, slot: Slot, decode_tokens: int
    ) -> None:
        self._config = config
        self._kv, self._estimate = parts.kv, parts.estimate
        self._running_sets = parts.slots.running_sets
        self._preemption = preemption
        self._slot = slot
        self._prompt = config.max_prefill_tokens - decode_tokens
        self._chunk = None if config.chunk is None else max(config.chunk - decode_tokens, 0)
        self._at_once = config.evict_for == "row"
        """Prompts have their pages as soon as they are chosen."""
        self._reserved = self._estimate.reserved_tokens(self._running_sets)
        """Tokens of KV that are set aside, at first for the running requests alone."""

    def make_room(self, req: Req) -> bool:
        """Take what the first request in order needs from running ones, if that is allowed; whether it can be let in now."""
        made = self._preemption.make_room(req, self._slot, self._most_need())
        self._reserved = self._estimate.reserved_tokens(self._running_sets)
        return made

    @abstractmethod
    def _most_need(self) -> float:
        """The most KV, in tokens, that a new request may need."""
