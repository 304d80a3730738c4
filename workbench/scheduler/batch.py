"""The compact batch that crosses from the scheduler to a backend.

Three layers of batch exist. :class:`~workbench.scheduler.schedule_batch.ScheduleBatch` belongs to the scheduler and knows
requests. :class:`ModelWorkerBatch` below is frozen and holds arrays and numbers only: the one thing a backend is
given, be it a modelled GPU, a thread, or a process on another GPU. A ``ForwardBatch`` of device tensors lives in
``backends/torch`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from workbench.scheduler.request import SamplingParams

Mode = Literal["prefill", "decode", "mixed"]
MODES: tuple[Mode, ...] = get_args(Mode)


class PageWrite(NamedTuple):
    """Consecutive entries of one page-table row, to be written before the batch runs."""

    row: int
    first_page: int
    """Index into the row: the entry for page ``first_page`` of that request."""
    pages: np.ndarray
    """int32[k], ids of KV pages."""


class KVCopy(NamedTuple):
    """Pages of this instance that are copied elsewhere, or from elsewhere."""

    direction: Literal["load", "store", "save", "send", "receive", "forget"]
    """From and to the host's memory; to and from another instance. What is saved goes to the host, too, but before the
    batch, which gives the pages to somebody else; who will not load it has it forgotten."""
    pages: np.ndarray
    """int32[k], ids of KV pages of this instance."""
    name: str = ""
    """Of what is kept in the host's memory beyond the batch: the id of its request."""
    first_page: int = 0
    """The place of the first of them in what has this name."""


class NewRequest(NamedTuple):
    """A row that starts, or starts again after a retraction: what a backend needs to know of its request, once."""

    row: int
    request_id: str
    input_len: int
    """Tokens of the prompt; ``tokens`` beyond them are output from before a retraction."""
    tokens: np.ndarray
    """int32[n], all it computes before it decodes, those found in the prefix cache included."""
    params: SamplingParams


class ModelWorkerBatch(NamedTuple):
    """One forward step as a backend sees it: ragged queries, each a run of tokens at the end of its row's sequence.

    A row computes ``query_lens`` tokens: a chunk of a prompt, 1 for a decode, 1 + d for the verification of d drafted
    tokens. Rows are ordered: the ``num_prefill`` rows that extend a prompt come first, then rows that decode. Lengths are
    *launched* ones. For a row that decodes one token they are true once the batch is done; for a verification they are
    upper bounds, and what is *confirmed* is known by its :class:`StepOutput`: a backend that verifies keeps the confirmed
    length of every row, as it keeps the row's last token, and its positions start from there.

    A named tuple, because it is made on every step and takes a tenth of the time of a frozen dataclass. The arrays are
    never written after the batch is made: several batches may be in flight.
    """

    step: int
    """Counts the batches of this scheduler from 0."""
    mode: Mode
    rows: np.ndarray
    """int64[n], row of each request in the page table and the token pool."""
    epoch: int
    """Who is in the batch: batches of one scheduler with the same epoch have the same requests in the same rows and order,
    so that what was worked out for one need not be worked out for the next. It grows whenever the membership of a running
    set changes; a batch with prefills has one of its own."""
    seq_lens: np.ndarray
    """int64[n], tokens in each request's KV after this step, the new ones included (launched lengths)."""
    query_lens: np.ndarray
    """int64[n], tokens that each row computes in this step: the last ones of its ``seq_lens``."""
    num_prefill: int
    """Number of leading rows that extend a prompt (the rest decode)."""
    num_samples: int
    """Rows that emit a token in this step: decodes, and prefills whose prompt is complete after it and that want one."""
    prefill_tokens: int
    """Sum of ``query_lens`` over the rows that extend a prompt."""
    decode_tokens: int
    """Sum of ``query_lens`` over the rows that decode: their number, unless tokens are verified."""
    context_tokens: int
    """Sum of ``seq_lens``: KV tokens that attention reads in this step."""
    input_ids: np.ndarray | None
    """int32[prefill_tokens], the prompt tokens to compute, concatenated. A decode row's input is the last token sampled
    for that row; it may not be known on the host yet and is gathered on the device."""
    unsampled: np.ndarray | None
    """int64[k], indices of prefill rows whose sample is never used: the prompt is not complete after this step (a chunk
    that is not the last), or its request wants no output. None when every row samples."""
    new_requests: tuple[NewRequest, ...]
    """Every row that starts, or starts again after a retraction, in this batch. One that decodes has its KV from elsewhere:
    the last of its tokens is its input."""
    decode_page_rows: np.ndarray | None
    """int64[m], decode rows that get a new page in this step, or None when no row does."""
    decode_pages: np.ndarray | None
    """int32[m], the page each of ``decode_page_rows`` gets; it becomes page ``(seq_len - 1) // page_size``."""
    page_writes: tuple[PageWrite, ...]
    """Every other change of the page table since the last batch, in order."""
    kv_used_tokens: int
    """Tokens of KV capacity held by requests when the batch was formed (cached, unlocked tokens are not counted)."""
    waiting: int
    """Requests in the waiting queue after the batch was formed."""
    running: int
    """Requests that hold KV after the batch was formed: decoding, chunked, or in this prefill."""
    next_chunk_tokens: int = 0
    """Prompt tokens still to compute of requests whose prompt is unfinished after this batch."""
    decode_page_places: np.ndarray | None = None
    """int64[m], where in its row each of ``decode_pages`` goes, where a step may bring a row several tokens: it may need
    several pages. None: as said there."""
    kv_copies: tuple[KVCopy, ...] = ()
    """Copies beside the page writes, with a wait of their own (``Backend.copied``). What is saved, loaded or received is
    copied before the batch begins; what is stored or sent, once the batch has written it. A scheduler of a decode instance
    saves and loads."""
    masked: np.ndarray | None = None
    """int64[k], indices of rows that may sample only what a mask allows: the batch samples in a second phase, when the
    masks are there (``Backend.sample``). None: it samples by itself."""

    @property
    def decodes(self) -> int:
        """Number of rows that decode."""
        return len(self.rows) - self.num_prefill


class Logprobs(NamedTuple):
    """Log probabilities of a step's tokens, before temperature and filters."""

    sampled: np.ndarray
    """float32[t], of each token."""
    top: np.ndarray
    """float32[t, k], the largest at its place, in order; k is the most that any request of the batch asked for."""
    top_ids: np.ndarray
    """int64[t, k], their token ids."""


@dataclass(slots=True)
class StepOutput:
    """The samples of a step, on the host. The arrays belong to whoever asked: they are not written again."""

    tokens: np.ndarray
    """int[t], row after row. Those of a batch's ``unsampled`` rows mean nothing."""
    counts: np.ndarray | None = None
    """int64[n], how many of ``tokens`` each row got, 1 or more; None: exactly one a row, so that t is n."""
    logprobs: Logprobs | None = None
    """None when nobody asked."""
    prompt_logprobs: dict[int, tuple[int, Logprobs]] | None = None
    """By index of a row whose request asked: the place in its prompt of the first token told of, and those from there on."""


@cache
def one_each(rows: int) -> np.ndarray:
    """int64[rows] of ones, the ``query_lens`` of plain decoding. Shared by all who ask, and read-only."""
    ones = np.ones(rows, np.int64)
    ones.flags.writeable = False
    return ones


@cache
def step_numbers(count: int) -> np.ndarray:
    """int64[count, 1]: 0, 1, 2, ... Kept, because looking them up takes less time than making them."""
    numbers = np.arange(count)[:, None]
    numbers.flags.writeable = False
    return numbers
