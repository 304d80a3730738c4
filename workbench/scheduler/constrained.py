"""Constrained requests of a batch: what each may sample, and which end with what they have sampled."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.grammar import Grammar
from workbench.scheduler.request import Finish
from workbench.scheduler.schedule_batch import ScheduleBatch


def masked_rows(batch: ScheduleBatch) -> np.ndarray | None:
    """int64[k], rows of a batch that sample, and only what a grammar allows; None where there is none."""
    unsampled = batch.worker.unsampled
    silent = () if unsampled is None else unsampled.tolist()
    rows = [i for i, req in enumerate(batch.reqs) if req.grammar is not None and i not in silent]
    return np.array(rows, np.int64) if rows else None


def masks_of(batch: ScheduleBatch) -> np.ndarray | None:
    """int32[k, words], what each of ``batch.worker.masked`` may sample; anything, where nobody waits for it any more. None
    where no mask has words: all may sample anything."""
    assert batch.worker.masked is not None
    dropped = batch.dropped or ()
    found: list[tuple[Grammar, int]] = []
    words = 0
    for place, row in enumerate(batch.worker.masked.tolist()):
        req = batch.reqs[row]
        assert req.grammar is not None
        words = req.grammar.words
        if req.finish is None and row not in dropped:
            found.append((req.grammar, place))
    if not words:
        return None
    masks = np.full((len(batch.worker.masked), words), -1, np.int32)
    if found:
        found[0][0].fill(found, masks)
    return masks


def ends_by_grammar(batch: ScheduleBatch, tokens: np.ndarray) -> dict[int, Finish]:
    """Give the grammars of a batch what its rows have sampled, int[n]; returns which requests end with that, and how."""
    assert batch.worker.masked is not None
    dropped = batch.dropped or ()
    ends: dict[int, Finish] = {}
    for row in batch.worker.masked.tolist():
        req = batch.reqs[row]
        if req.finish is not None or row in dropped:
            continue
        assert req.grammar is not None
        if not req.grammar.accept(int(tokens[row])):
            ends[row] = Finish("aborted", "grammar_dead_end")
        elif req.grammar.complete:
            ends[row] = Finish("stop")
    return ends
