"""A model of tests that verifies drafted tokens: it gives each row a run of them, and has KV that it looks at."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from backends.simulated.sampler import ScriptedSampler
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput
from workbench.scheduler.config import SchedulerConfig

REJECTED = -2
"""What the KV of a drafted token holds that was not accepted."""


class Verifier(ScriptedSampler):
    """Gives each row that decodes the next 1 to ``query_len`` tokens of its script, by a hash of the request and the place
    in its output: every loop and batching sees the same draws.

    It keeps what a real model keeps: the confirmed length of every row, the page table, and in each page the tokens whose KV
    was computed into it. Whatever a row attends to must be its own tokens, in their order. Steps are done in the order of
    their launch, which is that of their results.
    """

    def __init__(self, script: Callable[[str], tuple[int, np.ndarray]], rows: int, config: SchedulerConfig) -> None:
        super().__init__(script, rows)
        size = config.page_size
        self._page_size = size
        self._draft_tokens = config.draft_tokens
        self._kv = np.full((config.pages, size), -1, np.int64)
        self._pages = np.full((rows, -(-(config.max_context + 1) // size)), -1, np.int64)
        self._ids = [""] * rows
        self._lens = np.zeros(rows, np.int64)
        """Tokens of each row whose KV is computed and true."""
        self._said: list[np.ndarray] = [np.empty(0, np.int64)] * rows
        """Prompt and output of each row."""
        self.runs: list[int] = []
        """Length of every run."""

    def sample(self, batch: ModelWorkerBatch, steps: int = 1) -> StepOutput:
        assert steps == 1
        for new in batch.new_requests:
            self._ids[new.row], self._said[new.row] = new.request_id, new.tokens.astype(np.int64)
            self._pages[new.row] = -1
        for row, first_page, pages in batch.page_writes:
            self._pages[row, first_page : first_page + len(pages)] = pages
        if batch.decode_page_rows is not None:
            places = batch.decode_page_places
            if places is None:
                lens = dict(zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True))
                places = np.array([(lens[row] - 1) // self._page_size for row in batch.decode_page_rows.tolist()], int)
            self._pages[batch.decode_page_rows, places] = batch.decode_pages
        unsampled = set() if batch.unsampled is None else set(batch.unsampled.tolist())
        tokens: list[int] = []
        counts: list[int] = []
        for i, row in enumerate(batch.rows.tolist()):
            query, most = int(batch.query_lens[i]), int(batch.seq_lens[i])
            prefill = i < batch.num_prefill
            start = most - query if prefill else int(self._lens[row])
            assert query >= 1 and start + query <= most, "a launched length is a bound of the confirmed one"
            assert prefill or query <= 1 + self._draft_tokens
            said = self._said[row]
            self._write(row, start, said[start : start + query] if prefill else said[start:])
            run = query if prefill else 1 + self._draw(row, len(said)) % query
            given = [] if i in unsampled else self._next(row, 1 if prefill else run)
            self._said[row] = np.concatenate((said, given)).astype(np.int64)
            if not prefill:
                # What was accepted was drafted, and computed with the rest; what follows it is anything.
                self._write(row, start + 1, np.array([*given[:-1], *[REJECTED] * (query - run)]))
                self.runs.append(run)
            self._lens[row] = start + run
            self._look(row)
            tokens += given or [0]
            counts.append(len(given) or 1)
        return StepOutput(np.array(tokens, np.int32), np.array(counts, np.int64) if self._draft_tokens else None)

    def _draw(self, row: int, place: int) -> int:
        return zlib.crc32(f"{self._ids[row]} {place}".encode())

    def _next(self, row: int, count: int) -> list[int]:
        at = self._starts[row] + len(self._said[row]) + np.arange(count)
        return self._flat[np.minimum(at, len(self._flat) - 1)].tolist()

    def _write(self, row: int, start: int, tokens: np.ndarray) -> None:
        """Compute the KV of tokens into the row's pages."""
        at = start + np.arange(len(tokens))
        pages = self._pages[row, at // self._page_size]
        assert (pages >= 0).all(), "a token has no page"
        self._kv[pages, at % self._page_size] = tokens

    def _look(self, row: int) -> None:
        """Attend to everything before."""
        at = np.arange(self._lens[row])
        seen = self._kv[self._pages[row, at // self._page_size], at % self._page_size]
        assert (seen == self._said[row][: len(at)]).all(), f"{self._ids[row]} attends to KV that is not its own"
