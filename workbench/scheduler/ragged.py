"""Steps that bring each row a run of tokens: 1 to d + 1 of them, how many is known only once the step is done.

Every row that decodes computes its last token and d drafted ones behind it, and is given the longest run that holds and one
token more. So a row has two lengths. *Launched*: the tokens that its KV may have once all steps in flight are done, if
everything drafted holds; batches are formed with it, and pages are held for it. *Confirmed*: what has been given, as far as
steps have been processed. What a step brings less than it might have is taken off the launched length when it is processed;
the pages stay, and the next step overwrites the KV of what did not hold.

Nothing is drafted beyond a request's output bound, nor beyond what the KV pool holds of one request. So a launched length is
never larger than the length at which its request stops, and nothing overflows the tables. A row whose launched length is
that already, while its confirmed one is not, sits out until the step in flight has been processed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from workbench.scheduler.batch import Logprobs, StepOutput
from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.request import Req
from workbench.scheduler.running import DecodeStep, RunningSet
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.stops import StopIds, chosen, stopped

_NOBODY = np.empty(0, np.int64)


class RaggedRunningSet(RunningSet):
    """Requests that decode with ``draft_tokens`` drafted tokens each. ``pool_tokens`` is what the KV pool holds."""

    ragged = True

    def __init__(
        self, table: TableManager, page_size: int, epochs: Iterator[int], draft_tokens: int, pool_tokens: int
    ) -> None:
        self.held_pages = _NOBODY
        """int64[n], pages of each row, from its first: never fewer than its launched length takes."""
        self._queries = _NOBODY
        """int64[n], tokens that each computes in its next step; 0 for one that has to sit out."""
        self._pool_tokens = pool_tokens
        super().__init__(table, page_size, epochs)
        self.draft_tokens = draft_tokens

    @property
    def confirmed(self) -> np.ndarray:
        known: np.ndarray = self._table.known[self.rows] - 1
        return known

    @property
    def held_tokens(self) -> np.ndarray:
        held: np.ndarray = self.held_pages * self._page_size
        return held

    @property
    def next_tokens(self) -> int:
        return int(self._queries.sum())

    def add(
        self,
        reqs: Sequence[Req],
        rows: np.ndarray,
        lens: np.ndarray,
        ends: np.ndarray,
        token_at: np.ndarray,
        stop_ids: StopIds,
    ) -> None:
        self._table.known[rows] = lens  # the first token is still to come
        self.held_pages = np.concatenate((self.held_pages, self._pages_for(lens)))
        super().add(reqs, rows, lens, ends, token_at, stop_ids)
        self._look_ahead()

    def remove(self, indices: Sequence[int]) -> list[Req]:
        gone = super().remove(indices)
        self.held_pages = np.delete(self.held_pages, indices)
        self._look_ahead()
        return gone

    def known_tokens(self, in_flight: bool) -> np.ndarray:
        known: np.ndarray = self._table.known[self.rows]
        return known

    def aside(self, indices: Sequence[int]) -> RaggedRunningSet:
        held = self.held_pages[indices]
        others = super().aside(indices)
        assert isinstance(others, RaggedRunningSet)
        others.held_pages = held
        return others

    def _rejoin(self, others: RunningSet) -> None:
        assert isinstance(others, RaggedRunningSet)
        known, count = self._table.known[others.rows], self.count
        super()._rejoin(others)
        self._table.known[others.rows] = known
        self.held_pages[count:] = others.held_pages
        self._look_ahead()

    def _reorder(self, order: list[int]) -> None:
        self.held_pages = self.held_pages[order]
        super()._reorder(order)
        self._look_ahead()

    @property
    def step_tokens(self) -> np.ndarray:
        return self._queries

    def updated(self, index: int) -> Req:
        req = super().updated(index)
        req.spare_tokens = int(self.held_pages[index]) * self._page_size - req.kv_len
        return req

    def needs(self) -> np.ndarray:
        return np.maximum(self._pages_for(self.lens + self._queries) - self.held_pages, 0)

    def needing_page(self, steps: int = 1) -> np.ndarray:
        """Indices of the requests that need a page for their next step, as many times as they need one."""
        assert steps == 1, "how far a step goes is known only once it is done"
        return np.repeat(np.arange(self.count), self.needs())

    def write_pages(self, needing: np.ndarray | None, pages: np.ndarray) -> None:
        assert needing is not None
        self._table.add_pages(self.rows[needing] * self._table.page_width + self._new_places(needing), pages)

    def _new_places(self, needing: np.ndarray) -> np.ndarray:
        """int64[m]: the n-th page that a row gets goes n places behind those that it has."""
        needs = np.bincount(needing, minlength=self.count)
        places: np.ndarray = self.held_pages[needing] + np.arange(len(needing)) - (np.cumsum(needs) - needs)[needing]
        return places

    def step(self, needing: np.ndarray | None, pages: np.ndarray) -> DecodeStep:
        assert needing is not None
        self.write_pages(needing, pages)
        queries = self._queries
        self.lens = self.lens + queries
        needs, places = np.bincount(needing, minlength=self.count), self._new_places(needing)
        page_rows = self.rows[needing]
        self.held_pages = self.held_pages + needs
        self.context_tokens = int(self.lens.sum())
        self._look_ahead()
        going = queries > 0
        if going.all():
            reqs, rows, epoch, lens, ends = self.reqs, self.rows, self.epoch, self.lens, self.ends
            stop_ids, context_tokens = self.stop_ids, self.context_tokens
        else:
            at = going.nonzero()[0]
            reqs, rows, epoch, lens, ends = (
                list(compress(self.reqs, going)),
                self.rows[at],
                next(self._epochs),
                self.lens[at],
                self.ends[at],
            )
            stop_ids, context_tokens, queries = chosen(self.stop_ids, at), int(lens.sum()), queries[at]
        tokens = int(queries.sum())
        return DecodeStep(
            reqs,
            rows,
            epoch,
            lens,
            queries,
            tokens,
            context_tokens,
            _NOBODY,
            ends,
            stop_ids,
            (),
            page_rows,
            pages,
            places,
        )

    def confirm(self, rows: np.ndarray, surplus: np.ndarray) -> None:
        """Take off the launched lengths, int64[n], what a step has brought these rows less than it might have. Rows of
        requests that are not running any more are passed over."""
        place = np.full(self._table.rows, -1)
        place[self.rows] = np.arange(self.count)
        at = place[rows]
        stays = at >= 0
        self.lens = self.lens.copy()  # batches in flight hold it
        self.lens[at[stays]] -= surplus[stays]
        self.context_tokens = int(self.lens.sum())
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Work out what each computes in its next step."""
        room = np.minimum(self.ends, self._pool_tokens) - self.lens
        queries = np.clip(room, 0, 1 + self.draft_tokens)
        # One that fills the pool, with nothing in flight, needs a page more than there are: it is not for it to wait.
        queries[(room <= 0) & (self.lens == self.confirmed)] = 1
        self._queries = queries
        self.stalled = not queries.any()

    def _pages_for(self, tokens: np.ndarray) -> np.ndarray:
        pages: np.ndarray = -(-tokens // self._page_size)
        return pages


class Runs(NamedTuple):
    """The tokens that a step has brought, up to where its requests stop."""

    output: StepOutput
    """With ``counts``: tokens that each row is given, none to those that are unsampled or dropped."""
    length_stops: Sequence[int]
    """Rows that reach their output bound with their run."""
    hits: Sequence[int]
    """Rows that end at a stop id before that."""
    valid: np.ndarray
    """int64[n], tokens of each row's KV that belong to what it has been given."""


def take_runs(batch: ScheduleBatch, output: StepOutput, running: RunningSet, table: TableManager) -> Runs:
    """Write a step's tokens into the table, confirm lengths, and cut each run at the first stop id.

    No run is longer than the output bound allows, for nothing was drafted beyond it. ``batch`` is the oldest in flight, of
    the slot that ``running`` is of. Raises AssertionError for an output that has more tokens for a row than it computed.
    """
    assert isinstance(running, RaggedRunningSet)
    worker = batch.worker
    rows, first = worker.rows, worker.num_prefill
    counts = np.ones(len(rows), np.int64) if output.counts is None else output.counts
    most = worker.query_lens.copy()
    most[:first] = 1
    assert len(output.tokens) == counts.sum() and (counts >= 1).all() and (counts <= most).all(), "runs of wrong length"
    # Where each run goes: behind what the row has.
    known = np.concatenate((worker.seq_lens[:first], table.known[rows[first:]]))
    row_of = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(row_of)) - (np.cumsum(counts) - counts)[row_of]
    sampled = np.ones(len(rows), bool)
    if worker.unsampled is not None:
        sampled[worker.unsampled] = False
    is_token = sampled[row_of]
    at = rows[row_of] * table.width + known[row_of] + nth
    table.add_tokens(at[is_token], output.tokens[is_token])
    table.known[rows[sampled]] = (known + counts)[sampled]
    running.confirm(rows[first:], (most - counts)[first:])

    given = np.where(sampled, counts, 0)
    if batch.dropped:
        given[list(batch.dropped)] = 0
    length_stops = set(batch.length_stops)
    if len(batch.ends):
        # The last token is never an input: a request has been given all it may when its KV lacks only that one.
        left = batch.ends + 1 - known[first:]
        decodes = given[first:]
        length_stops.update((((decodes > 0) & (decodes == left)).nonzero()[0] + first).tolist())
    hits = []
    for hit in stopped(chosen(batch.stop_ids, row_of), output.tokens):
        row, count = int(row_of[hit]), int(nth[hit]) + 1
        if count < given[row] or (count == given[row] and row not in length_stops):
            given[row] = count
            hits.append(row)
            length_stops.discard(row)
    kept = nth < given[row_of]
    logprobs = output.logprobs
    if logprobs is not None:
        logprobs = Logprobs(*(values[kept] for values in logprobs))
    valid = np.concatenate((worker.seq_lens[:first], known[first:] + given[first:] - 1))
    return Runs(StepOutput(output.tokens[kept], given, logprobs), sorted(length_stops), hits, valid)
