"""The running set: requests that decode, one row of arrays each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np

from workbench.scheduler.batch import one_each
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.request import Req
from workbench.scheduler.stops import StopIds, chosen, stacked

_ONE = np.array(1)
"""Added on every step; numpy takes twice as long to add a Python number to a small array."""


class RunningSet:
    """State that a decode step touches, as arrays aligned with ``reqs``.

    ``advance`` makes new arrays instead of writing the old ones, because batches in flight hold them. Every change of
    membership takes the next of ``epochs``, which all running sets of a scheduler share: the same epoch means the same
    members in the same order.
    """

    def __init__(self, table: TableManager, page_size: int, epochs: Iterator[int]) -> None:
        self._table = table
        self._page_size = page_size
        self._epochs = epochs
        self.reqs: list[Req] = []
        self.context_tokens = 0
        """Sum of ``lens``."""
        self.steps_to_stop = 0
        """Steps until the first one stops by length: a comparison of numbers instead of arrays on most steps."""
        nobody = np.empty(0, np.int64)
        self._set(nobody, nobody, nobody, nobody, None)

    def _set(
        self, rows: np.ndarray, lens: np.ndarray, ends: np.ndarray, token_at: np.ndarray, stop_ids: StopIds
    ) -> None:
        self.rows = rows
        """int64[n], table rows."""
        self.lens = lens
        """int64[n], tokens in KV, launched steps included."""
        self.ends = ends
        """int64[n], KV length at which each stops by length."""
        self.count = len(rows)
        self.query_lens = one_each(self.count)
        """int64[n], tokens that each computes in a step."""
        self.epoch = next(self._epochs)
        """Stands for the members and their order."""
        self.token_at = token_at
        """int64[n], index in the token table of each one's newest token: the one its last launched step samples."""
        self.stop_ids = stop_ids
        """What samples end them."""

    @property
    def remaining(self) -> np.ndarray:
        """int64[n], most tokens each may still generate."""
        left: np.ndarray = self.ends - self.lens
        return left

    def add(
        self,
        reqs: Sequence[Req],
        rows: np.ndarray,
        lens: np.ndarray,
        ends: np.ndarray,
        token_at: np.ndarray,
        stop_ids: StopIds,
    ) -> None:
        """Admit requests whose prompt is in KV, with their entries of these arrays."""
        self.reqs = [*self.reqs, *reqs]
        steps = min(r.end_len - r.kv_len for r in reqs)
        self.steps_to_stop = min(self.steps_to_stop, steps) if self.count else steps
        self.context_tokens += sum(r.kv_len for r in reqs)
        self._set(
            np.concatenate((self.rows, rows)),
            np.concatenate((self.lens, lens)),
            np.concatenate((self.ends, ends)),
            np.concatenate((self.token_at, token_at)),
            stacked(self.stop_ids, stop_ids, self.count, len(reqs)),
        )

    def remove(self, indices: Sequence[int]) -> list[Req]:
        """Take requests out, with their ``kv_len`` brought up to date."""
        gone = [self.reqs[i] for i in indices]
        soonest = False
        stays = bytearray(b"\1") * self.count
        for i, req in zip(indices, gone, strict=True):
            req.kv_len = int(self.lens[i])
            self.context_tokens -= req.kv_len
            soonest |= req.end_len - req.kv_len == self.steps_to_stop
            stays[i] = 0
        self.reqs = list(compress(self.reqs, stays))
        stay = np.frombuffer(stays, bool).nonzero()[0]  # several arrays are cut, and with indices that is quicker
        stop_ids = chosen(self.stop_ids, stay)
        self._set(self.rows[stay], self.lens[stay], self.ends[stay], self.token_at[stay], stop_ids)
        if soonest:
            self.steps_to_stop = min(self.remaining.tolist(), default=0)
        return gone

    def needing_page(self) -> np.ndarray | None:
        """Indices whose next token starts a page; None means all of them (page size 1)."""
        if self._page_size == 1:
            return None
        starting: np.ndarray = (self.lens % self._page_size == 0).nonzero()[0]
        return starting

    def page_needs(self, steps: int) -> list[int]:
        """Pages that each of the next steps takes."""
        if self._page_size == 1:
            return [self.count] * steps
        needs: list[int] = self._starts_page(steps).sum(axis=1).tolist()
        return needs

    def page_places(self, steps: int) -> np.ndarray:
        """int64[m], where in the page table the pages of the next steps go, step by step, as :meth:`advance` has it; with
        one token a page they are the places of the tokens, and this is not asked."""
        step, index = self._starts_page(steps).nonzero()
        places: np.ndarray = self.rows[index] * self._table.page_width + (self.lens[index] + step) // self._page_size
        return places

    def _starts_page(self, steps: int) -> np.ndarray:
        starts: np.ndarray = (self.lens + np.arange(steps)[:, None]) % self._page_size == 0
        return starts

    def advance(self, needing: np.ndarray | None, pages: np.ndarray) -> Sequence[int]:
        """One decode step: every request grows by a token, those in ``needing`` into the next of ``pages``.

        Returns the indices of requests that stop by length with this step.
        """
        if needing is None:  # one token a page: a row's pages and its tokens are numbered alike
            self._table.add_pages(self.token_at, pages)
        elif len(needing):
            at = self.rows[needing] * self._table.page_width + self.lens[needing] // self._page_size
            self._table.add_pages(at, pages)
        self.lens = self.lens + _ONE
        self.token_at = self.token_at + _ONE
        self.context_tokens += self.count
        self.steps_to_stop -= 1
        return () if self.steps_to_stop else (self.lens == self.ends).nonzero()[0].tolist()


def place_of(req: Req, reqs: Sequence[Req]) -> int | None:
    """Index of a request among others, or None."""
    # Once a request: arrays of rows would cost a comparison, a search and a look.
    for place, other in enumerate(reqs):
        if other is req:
            return place
    return None
