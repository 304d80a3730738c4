"""Sampling, logits to tokens: every request's parameters in device arrays, one row a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from backends.torch.row_entries import RowEntries
from backends.torch.staging import to_device
from backends.torch.vocabulary_masks import WORD_BITS, forbid
from workbench.scheduler.batch import ModelWorkerBatch, NewRequest

MOST_LOGPROBS = 20
"""What memory is measured with; more of them take little more."""


@dataclass(slots=True)
class DeviceLogprobs:
    """Log probabilities of one batch's samples, before temperature and filters. On the host once the forward is done."""

    sampled: Tensor
    """float32[n]."""
    top: Tensor
    """float32[n, k], the largest, in order; k is the most that any request of the batch asked for."""
    top_ids: Tensor
    """int64[n, k]."""


class Sampler:
    """Samples a batch in a handful of operators, whatever its requests ask for.

    What every request asks for lives on the device, indexed by its table row. The host keeps the few facts that decide
    which operators are needed at all, so that a batch of greedy requests costs one argmax and nothing waits for the device.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        ops: ModuleType,
        seed: int = 0,
    ) -> None:
        self._vocab, self._eos, self._device, self._ops, self._seed = vocab, eos_token_ids, device, ops, seed
        self._temperature = torch.zeros(rows, device=device)
        self._top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self._top_p = torch.ones(rows, device=device)
        self._min_p = torch.zeros(rows, device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._penalties = torch.tensor([1.0, 0.0, 0.0], device=device).repeat(rows, 1)
        """float32[rows, 3]: repetition, presence, frequency."""
        self._rows = rows
        self._counts: Tensor | None = None
        """int32[rows, vocab], occurrences in the output; made when the first request with penalties comes."""
        self._in_prompt: Tensor | None = None
        # The same facts on the host.
        self._random = np.zeros(rows, bool)
        self._filtered = np.zeros(rows, bool)
        self._penalised = np.zeros(rows, bool)
        self._logprobs = np.full(rows, -1)
        self._input_lens = np.zeros(rows, np.int64)
        self._min_new = np.zeros(rows, np.int64)
        self._bias, self._stops = RowEntries(rows, vocab), RowEntries(rows, vocab)

    def start(self, requests: tuple[NewRequest, ...]) -> None:
        """Take in the parameters of the requests that start in a batch."""
        if not requests:
            return
        params = [request.params for request in requests]
        # Two packed transfers, neither of which waits for what the device is doing.
        ints = self._send(
            np.array(
                [
                    [request.row for request in requests],
                    [p.top_k for p in params],
                    [self._seed_of(r) for r in requests],
                ],
                np.int64,
            )
        )
        floats = self._send(
            np.array(
                [
                    (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                    for p in params
                ],
                np.float32,
            )
        )
        rows = ints[0]
        self._temperature[rows], self._top_p[rows], self._min_p[rows] = floats[:, 0], floats[:, 1], floats[:, 2]
        self._penalties[rows] = floats[:, 3:]
        self._top_k[rows], self._seeds[rows] = ints[1].int(), ints[2]
        for request in requests:
            self._start_one(request)

    def _send(self, values: np.ndarray) -> Tensor:
        return to_device(values, self._device)

    def _start_one(self, request: NewRequest) -> None:
        row, p = request.row, request.params
        self._random[row] = p.temperature > 0
        self._filtered[row] = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self._logprobs[row] = -1 if p.logprobs is None else p.logprobs
        self._input_lens[row], self._min_new[row] = request.input_len, p.min_new_tokens
        ids, values = zip(*p.logit_bias, strict=True) if p.logit_bias else ((), ())
        self._bias.put(row, ids, values)
        self._stops.put(row, sorted({*self._eos, *p.stop_token_ids}) if p.min_new_tokens else ())
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        self._penalised[row] = penalised
        if penalised:
            counts, in_prompt = self._history()
            tokens = self._send(request.tokens.astype(np.int64))
            # Not by assignment: a number that is assigned through an index is sent to the device, which waits for it.
            in_prompt[row].zero_().index_fill_(0, tokens[: request.input_len], True)
            # Not bincount: the host would wait for the largest token.
            output = tokens[request.input_len :]
            counts[row].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _history(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._in_prompt is None:
            shape = (self._rows, self._vocab)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._in_prompt

    def _seed_of(self, request: NewRequest) -> int:
        """A request's own seed, or one drawn from its name: the same request samples the same on every run."""
        seed = request.params.seed
        return (crc32(request.request_id.encode()) ^ self._seed) if seed is None else seed & 0x7FFFFFFF

    def sample(
        self, logits: Tensor, batch: ModelWorkerBatch, rows: Tensor, seq_lens: Tensor
    ) -> tuple[Tensor, DeviceLogprobs | None]:
        """int64[n], a token for every row of the batch (those of ``batch.unsampled`` mean nothing), and their log
        probabilities if a request asks for them.

        logits: [n, vocab] of any float dtype, may be overwritten; rows, seq_lens: the batch's, on the device. Only what is
        added to logits needs more digits than the model gave them: else they are sampled from as they are.
        """
        host_rows = batch.rows
        top = int(self._logprobs[host_rows].max())
        penalised = bool(self._penalised[host_rows].any())
        changes = self._changes(batch)
        raw = logits
        if penalised or changes:
            logits = raw.to(torch.float32, copy=top >= 0)
        for change in changes:
            change(logits.view(-1))
        if penalised:
            counts, in_prompt = self._history()
            repetition, presence, frequency = self._penalties[rows].unbind(1)
            self._ops.penalize(logits, counts[rows], in_prompt[rows], repetition, presence, frequency)
        greedy = not self._random[host_rows].any()
        tokens = self._ops.sample(
            logits,
            *self._parameters(None if greedy else rows, len(logits)),
            seq_lens.long(),
            all_greedy=greedy,
            filtered=bool(self._filtered[host_rows].any()),
        )
        if penalised:
            self._count(batch, rows, tokens)
        return tokens, None if top < 0 else DeviceLogprobs(*self._ops.logprobs(raw, tokens, top))

    def _changes(self, batch: ModelWorkerBatch) -> list[Callable[[Tensor], object]]:
        """What is to be done to the batch's logits, all of them in a row: biases, and stop tokens that may not come yet."""
        changes: list[Callable[[Tensor], object]] = []
        index, ids, values = self._bias.of(batch.rows)
        if len(index):
            at, added = self._send(index * self._vocab + ids), self._send(values)
            changes.append(lambda flat: flat.index_add_(0, at, added))
        index, ids, _ = self._stops.of(batch.rows)
        if len(index):
            early = batch.seq_lens - self._input_lens[batch.rows] < self._min_new[batch.rows]
            kept = (index * self._vocab + ids)[early[index]]
            if len(kept):
                stops = self._send(kept)
                changes.append(lambda flat: flat.index_fill_(0, stops, float("-inf")))
        return changes

    def rehearse(self, logits: Tensor) -> None:
        """Do to logits [n, vocab] whatever requests can ask for, to find out how much memory that takes."""
        count, rows = len(logits), torch.arange(len(logits), device=self._device)
        words = np.full((count, -(-self._vocab // WORD_BITS)), -1, np.int32)
        forbid(logits, np.arange(count), words, self._ops)
        changed = logits.to(torch.float32, copy=True)
        counts, in_prompt = self._history()
        self._ops.penalize(changed, counts[rows], in_prompt[rows], *self._penalties[rows].unbind(1))
        tokens = self._ops.sample(changed, *self._parameters(rows, count), rows, all_greedy=False, filtered=True)
        self._ops.logprobs(logits, tokens, min(MOST_LOGPROBS, self._vocab))

    @contextmanager
    def with_tables(self) -> Iterator[None]:
        """Hold the tables of penalties meanwhile, as from the first request on that needs them."""
        self._history()
        try:
            yield
        finally:
            self._counts = self._in_prompt = None

    def _parameters(self, rows: Tensor | None, count: int) -> tuple[Tensor, ...]:
        """What each of these rows is sampled with; rows None: as many of any, for greedy samples look at none."""
        tables = (self._temperature, self._top_k, self._top_p, self._min_p, self._seeds)
        return tuple(table[:count] if rows is None else table[rows] for table in tables)

    def _count(self, batch: ModelWorkerBatch, rows: Tensor, tokens: Tensor) -> None:
        """Add what was sampled to the histories of the requests that need one."""
        wanted = self._penalised[batch.rows]
        if batch.unsampled is not None:
            wanted[batch.unsampled] = False
        index = self._send(wanted.nonzero()[0])
        counts, _ = self._history()
        counts.index_put_((rows[index], tokens[index]), torch.ones_like(index, dtype=torch.int32), accumulate=True)
