"""Constrained requests, for tests: by a rule that a reader can check."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from workbench.scheduler.messages import Generate
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler

CYCLE = 7


def follows(token: int, before: int) -> bool:
    """The rule: the number of a token in a cycle of seven is one more than that of the token before."""
    return token % CYCLE == (before + 1) % CYCLE


@dataclass
class Constrained:
    """What the requests of ``rids`` have written, as far as it has been processed, and when their masks were asked for."""

    rids: Collection[str]
    vocab: int
    written: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[int, list[int]]] = field(default_factory=list)
    """(step whose masks were asked for, steps launched and not processed then)."""


class Cyclic:
    """A grammar of the rule. It takes whatever comes, for samplers by script look at no mask."""

    complete = False

    def __init__(self, found: Constrained, rid: str, prompt: np.ndarray) -> None:
        self._found, self._rid, self._last = found, rid, int(prompt[-1])
        self.words = -(-found.vocab // 32)

    def accept(self, token: int) -> bool:
        self._found.written.setdefault(self._rid, []).append(token)
        self._last = token
        return True

    def fill(self, grammars: Sequence[tuple[Cyclic, int]], masks: np.ndarray) -> None:
        for grammar, row in grammars:
            allowed = np.arange(self._found.vocab) % CYCLE == (grammar._last + 1) % CYCLE
            masks[row] = packed(allowed[None])[0]


def constrain(monkeypatch: pytest.MonkeyPatch, rids: Collection[str], vocab: int) -> Constrained:
    """Have every scheduler constrain these requests until the end of the test."""
    found = Constrained(rids, vocab)
    receive, masks = Scheduler.receive, Scheduler.masks

    def constrained(message: object) -> object:
        if isinstance(message, Generate) and message.rid in rids:
            return replace(message, grammar=Cyclic(found, message.rid, message.prompt))
        return message

    def noted(self: Scheduler, batch: ScheduleBatch) -> np.ndarray | None:
        found.asked.append((batch.worker.step, [one.worker.step for one in self.flights if one.slot == batch.slot]))
        return masks(self, batch)

    monkeypatch.setattr(Scheduler, "receive", lambda self, inbox: receive(self, [constrained(one) for one in inbox]))
    monkeypatch.setattr(Scheduler, "masks", noted)
    return found


def packed(allowed: np.ndarray) -> np.ndarray:
    """int32[k, ceil(vocab / 32)] out of bool[k, vocab], spelled out bit by bit."""
    rows, vocab = allowed.shape
    words = np.zeros((rows, -(-vocab // 32)), np.uint32)
    for row, token in zip(*allowed.nonzero(), strict=True):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words.view(np.int32)
