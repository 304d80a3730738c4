"""A scheduler whose requests are constrained, for tests: ours constrains none yet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest

from workbench.scheduler.batch import StepOutput
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult

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

    def allowed(self, req: Req) -> np.ndarray:
        """bool[vocab], what a request may write next. Wrong if its last token has not been processed."""
        before = [*req.prompt.tolist(), *self.written.get(req.rid, [])][-1]
        return np.arange(self.vocab) % CYCLE == (before + 1) % CYCLE


def constrain(monkeypatch: pytest.MonkeyPatch, rids: Collection[str], vocab: int) -> Constrained:
    """Have every scheduler constrain these requests until the end of the test."""
    found = Constrained(rids, vocab)
    form, process = Scheduler.next_batch, Scheduler.process
    in_flight: list[ScheduleBatch] = []

    def next_batch(self: Scheduler, slot: int = 0) -> ScheduleBatch | None:
        batch = form(self, slot)
        if batch is not None:
            unsampled = set(() if batch.worker.unsampled is None else batch.worker.unsampled.tolist())
            masked = [i for i, req in enumerate(batch.reqs) if req.rid in rids and i not in unsampled]
            if masked:
                batch.worker = batch.worker._replace(masked=np.array(masked))
            in_flight.append(batch)
        return batch

    def masks(self: Scheduler, batch: ScheduleBatch) -> np.ndarray:
        found.asked.append((batch.worker.step, [one.worker.step for one in in_flight if one.slot == batch.slot]))
        return packed(np.array([found.allowed(batch.reqs[i]) for i in batch.worker.masked]))

    def processed(self: Scheduler, batch: ScheduleBatch, output: StepOutput) -> StepResult:
        in_flight.remove(batch)
        for i in () if batch.worker.masked is None else batch.worker.masked.tolist():
            if not batch.dropped or i not in batch.dropped:
                found.written.setdefault(batch.reqs[i].rid, []).append(int(output.tokens[i]))
        return process(self, batch, output)

    for name, method in (("next_batch", next_batch), ("masks", masks), ("process", processed)):
        monkeypatch.setattr(Scheduler, name, method)
    return found


def packed(allowed: np.ndarray) -> np.ndarray:
    """int32[k, ceil(vocab / 32)] out of bool[k, vocab], spelled out bit by bit."""
    rows, vocab = allowed.shape
    words = np.zeros((rows, -(-vocab // 32)), np.uint32)
    for row, token in zip(*allowed.nonzero(), strict=True):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return words.view(np.int32)
