"""The running set: requests that decode, one row of arrays each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import compress
from typing import NamedTuple

import numpy as np

from workbench.scheduler.batch import one_each, step_numbers
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.request import Req
from workbench.scheduler.stops import StopIds, chosen, stacked

_NOBODY = np.empty(0, np.int64)
_ONE = np.array(1)
"""Added on every step; numpy takes twice as long to add a Python number to a small array."""


class DecodeStep(NamedTuple):
    """The decodes of a batch, in which ``n`` requests compute a step."""

    reqs: list[Req]
    rows: np.ndarray
    epoch: int
    seq_lens: np.ndarray
    """int64[n], launched lengths, this step included."""
    query_lens: np.ndarray
    tokens: int
    """Sum of ``query_lens``."""
    context_tokens: int
    """Sum of ``seq_lens``."""
    token_at: np.ndarray
    """int64[n], where each one's sample goes in the token table; empty where steps bring runs of tokens."""
    ends: np.ndarray
    """int64[n], KV length at which each stops by length; empty where such stops are known at launch."""
    stop_ids: StopIds
    stops: Sequence[int]
    """Indices of requests that stop by length with this step."""
    page_rows: np.ndarray
    """int64[m], rows that get a new page."""
    pages: np.ndarray
    """int32[m], the page that each of them gets."""
    page_places: np.ndarray | None
    """int64[m], where in its row each page goes; None: it holds the row's newest token."""


class RunningSet:
    """State that a decode step touches, as arrays aligned with ``reqs``.

    ``advance`` makes new arrays instead of writing the old ones, because batches in flight hold them. Every change of
    membership takes the next of ``epochs``, which all running sets of a scheduler share: the same epoch means the same
    members in the same order.
    """

    ragged = False
    """Whether steps bring runs of tokens (:class:`~workbench.scheduler.ragged.RaggedRunningSet`)."""
    stalled = False
    """Whether everybody has to wait for a step in flight."""
    overrun = 0
    """Steps that each is launched for after its last one."""
    draft_tokens = 0
    """Most tokens that each computes in a step beside its last one."""

    def __init__(self, table: TableManager, page_size: int, epochs: Iterator[int]) -> None:
        self._table = table
        self._page_size = page_size
        self._epochs = epochs
        self.reqs: list[Req] = []
        self.context_tokens = 0
        """Sum of ``lens``."""
        self.steps_to_stop = 0
        """Steps until the first one stops by length: a comparison of numbers instead of arrays on most steps."""
        self._set(_NOBODY, _NOBODY, _NOBODY, _NOBODY, None)

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
        return left - self.overrun if self.overrun else left

    @property
    def confirmed(self) -> np.ndarray:
        """int64[n], tokens in KV as far as is known for certain; a step that brings one token leaves no doubt."""
        return self.lens

    @property
    def held_tokens(self) -> np.ndarray:
        """int64[n], tokens that each one's pages cover, up to the end of a page."""
        return self.lens

    @property
    def next_tokens(self) -> int:
        """Tokens that the next step computes."""
        return self.count

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

    def rotate(self, count: int) -> None:
        """Put the last ``count`` members in front of the others."""
        others = self.count - count
        self._reorder([*range(others, self.count), *range(others)])

    def remove(self, indices: Sequence[int]) -> list[Req]:
        """Take requests out, with their ``kv_len`` brought up to date."""
        gone = [self.reqs[i] for i in indices]
        soonest = False
        stays = bytearray(b"\1") * self.count
        for i, req in zip(indices, gone, strict=True):
            self.context_tokens -= self.updated(i).kv_len
            soonest |= req.end_len - req.kv_len == self.steps_to_stop
            stays[i] = 0
        self.reqs = list(compress(self.reqs, stays))
        stay = np.frombuffer(stays, bool).nonzero()[0]  # several arrays are cut, and with indices that is quicker
        stop_ids = chosen(self.stop_ids, stay)
        self._set(self.rows[stay], self.lens[stay], self.ends[stay], self.token_at[stay], stop_ids)
        if soonest:
            self.steps_to_stop = min((self.ends - self.lens).tolist(), default=0)
        return gone

    def updated(self, index: int) -> Req:
        """A request with what it says of its KV brought up to date."""
        req = self.reqs[index]
        req.kv_len = int(self.lens[index])
        return req

    def known_tokens(self, in_flight: bool) -> np.ndarray:
        """int64[n], tokens of each that are known and in KV once its next step is done. ``in_flight``: a step of theirs is,
        and brings each the last token that will be in KV then."""
        known: np.ndarray = self.lens if in_flight else self.lens + _ONE
        return known

    def aside(self, indices: Sequence[int]) -> RunningSet:
        """Take requests out that sit a step out, until :meth:`put_back`."""
        at = np.array(indices)
        others = copy(self)
        others.reqs = [self.reqs[i] for i in indices]
        others._set(self.rows[at], self.lens[at], self.ends[at], self.token_at[at], chosen(self.stop_ids, at))
        self.remove(indices)
        return others

    def put_back(self, others: RunningSet) -> None:
        """Take those in again who sat a step out, and put everybody in the order of admission."""
        for req, length in zip(others.reqs, others.lens.tolist(), strict=True):
            req.kv_len = length
        self._rejoin(others)
        self.sort()

    def _rejoin(self, others: RunningSet) -> None:
        self.add(others.reqs, others.rows, others.lens, others.ends, others.token_at, others.stop_ids)

    def sort(self) -> None:
        """Put everybody in the order of admission."""
        turns = [req.turn for req in self.reqs]
        order = sorted(range(self.count), key=turns.__getitem__)
        if order != list(range(self.count)):
            self._reorder(order)

    def _reorder(self, order: list[int]) -> None:
        self.reqs = [self.reqs[i] for i in order]
        at = np.array(order)  # several arrays are put in order, and a list would be made one for each
        self._set(self.rows[at], self.lens[at], self.ends[at], self.token_at[at], chosen(self.stop_ids, at))

    @property
    def step_tokens(self) -> np.ndarray:
        """int64[n], tokens that each computes in its next step; 0 for one that has to wait for a step in flight."""
        return self.query_lens

    def needs(self) -> np.ndarray:
        """int64[n], pages that each needs for its next step."""
        needs: np.ndarray = (self.lens % self._page_size == 0).astype(np.int64)
        return needs

    def needing_page(self, steps: int = 1) -> np.ndarray | None:
        """int64[m], which of the tokens of the next ``steps`` start a page, counted through the members step by step. None
        means all of them (page size 1)."""
        if self._page_size == 1:
            return None
        lens = self.lens if steps == 1 else (self.lens + step_numbers(steps)).ravel()
        starting: np.ndarray = (lens % self._page_size == 0).nonzero()[0]
        return starting

    @property
    def fills_new_pages(self) -> bool:
        """Whether a step may fill a page that it takes."""
        return self._page_size == 1 or self.draft_tokens > 0

    def write_pages(self, needing: np.ndarray | None, pages: np.ndarray) -> None:
        """Put the pages of the next step into the table already: of those in ``needing`` (:meth:`needing_page`)."""
        if needing is None:  # one token a page: a row's pages and its tokens are numbered alike
            self._table.add_pages(self.token_at, pages)
        elif len(needing):
            self._add_pages(self.rows[needing], self.lens[needing], pages)

    def places(self, steps: int) -> np.ndarray:
        """int64[steps + 1, n], where in the token table the newest sample of each goes: ``token_at`` now, and after each of
        the next ``steps``."""
        places: np.ndarray = self.token_at + step_numbers(steps + 1)
        return places

    def advance(self, needing: np.ndarray | None, pages: np.ndarray) -> Sequence[int]:
        """One decode step: every request grows by a token. Those in ``needing`` (:meth:`needing_page`) start a page, the
        next of ``pages``. Returns the indices of requests that stop by length with this step."""
        if needing is None:  # as write_pages has it: nearly every step comes here, and a call would cost more than this
            self._table.add_pages(self.token_at, pages)
        elif len(needing):
            self.write_pages(needing, pages)
        self.lens = self.lens + _ONE
        self.token_at = self.token_at + _ONE
        self.context_tokens += self.count
        self.steps_to_stop -= 1
        return () if self.steps_to_stop else (self.lens == self.ends).nonzero()[0].tolist()

    def advance_all(self, needing: np.ndarray | None, pages: np.ndarray, places: np.ndarray) -> None:
        """As many steps as ``places`` (:meth:`places`) are of, with which nobody stops by length; ``needing`` and ``pages``
        are of all of them."""
        steps = len(places) - 1
        if needing is None:
            self._table.add_pages(places[:-1].ravel(), pages)
        elif len(needing):
            step, member = np.divmod(needing, self.count)
            self._add_pages(self.rows[member], self.lens[member] + step, pages)
        self.lens = self.lens + steps
        self.token_at = places[-1]
        self.context_tokens += steps * self.count
        self.steps_to_stop -= steps

    def _add_pages(self, rows: np.ndarray, lens: np.ndarray, pages: np.ndarray) -> None:
        """Give rows of so many tokens a page each for the next one."""
        self._table.add_pages(rows * self._table.page_width + lens // self._page_size, pages)

    def step(self, needing: np.ndarray | None, pages: np.ndarray) -> DecodeStep:
        """Have everybody who need not wait compute a step, with ``pages`` for those in ``needing``."""
        reqs, rows, epoch, queries, stop_ids = self.reqs, self.rows, self.epoch, self.query_lens, self.stop_ids
        page_rows = rows if needing is None else rows[needing]
        stops = self.advance(needing, pages)
        return DecodeStep(
            reqs,
            rows,
            epoch,
            self.lens,
            queries,
            len(rows),
            self.context_tokens,
            self.token_at,
            _NOBODY,
            stop_ids,
            stops,
            page_rows,
            pages,
            None,
        )


def place_of(req: Req, reqs: Sequence[Req]) -> int | None:
    """Index of a request among others, or None."""
    # Once a request: arrays of rows would cost a comparison, a search and a look.
    for place, other in enumerate(reqs):
        if other is req:
            return place
    return None
