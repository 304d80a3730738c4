"""ModelRunner: one rank's model, KV pool and sampler; runs batches one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from backends.torch.cuda_graphs import DecodeGraphs
from backends.torch.forward_batch import ForwardBatch, KVPool
from backends.torch.kv_pages import KVPages, SavedKV
from backends.torch.model_config import ModelConfig
from backends.torch.models.decoder import Model
from backends.torch.prompt_logprobs import PromptLogprobs
from backends.torch.sampler import DeviceLogprobs, Sampler
from backends.torch.staging import to_device
from backends.torch.vocabulary_masks import forbid
from ground.errors import InputError
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch

GRAPH_BYTES = 512 * 2**20
"""Set aside for what the driver keeps of recorded launches; assumed, not measured."""


class NoRoomForKV(InputError):
    """Weights and working memory leave no room for keys and values, in one line."""


@dataclass(slots=True)
class Output:
    """Result of one batch on a rank, still on the device."""

    hidden: Tensor | None
    """[n, hidden] for the next stage; None on the last."""
    tokens: Tensor | None
    """int64[b], one sample a row; None before the last stage, and of a batch with masked rows until it is sampled."""
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: dict[int, tuple[int, Logprobs]] | None = None
    """As in :class:`StepOutput`, on the host."""


@dataclass(slots=True)
class _StepLogits:
    """A batch that is still to be sampled, on the device."""

    batch: ModelWorkerBatch
    logits: Tensor
    """[b, vocab], in the model's dtype."""
    rows: Tensor
    seq_lens: Tensor
    prompt_logprobs: dict[int, tuple[int, Logprobs]] | None = None


class ModelRunner:
    """Turns a scheduler's batches into forward steps.

    The device keeps its own page table and each row's last token, so a decode step needs nothing from the host but which
    rows run and how long they are, and a batch can be started before the tokens it continues are known to the host.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        ops: ModuleType,
        device: torch.device,
        *,
        rows: int,
        max_context: int,
        page_size: int,
        seed: int = 0,
    ) -> None:
        self.model, self.config, self.ops, self.device = model, config, ops, device
        self.page_size, self.rows, self.max_context = page_size, rows, max_context
        self.parallel = model.parallel
        # One row more than the scheduler has, and one page: where the padding of a captured batch reads and writes.
        self.page_table = torch.zeros((rows + 1, -(-(max_context + 1) // page_size)), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.kv: KVPool | None = None
        self.kv_pages: KVPages | None = None
        self._saved: SavedKV | None = None
        self.graphs: DecodeGraphs | None = None
        self._unsampled: _StepLogits | None = None
        self._prompts = PromptLogprobs(ops, device)
        self.sampler = Sampler(rows + 1, config.vocab, config.eos_token_ids, device, ops, seed)

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in this rank's layers."""
        dtype = self.config.dtype or torch.float32
        return 2 * len(self.model.layers) * self.model.kv_heads * self.config.head_dim * dtype.itemsize

    def allocate(self, pages: int) -> None:
        """Make the KV pool. Raises NoRoomForKV when the device has not enough memory for it."""
        try:
            self.kv = KVPool.allocate(
                len(self.model.layers),
                (pages + 1) * self.page_size,
                self.model.kv_heads,
                self.config.head_dim,
                self.config.dtype or torch.float32,
                self.device,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            needed = (pages + 1) * self.page_size * self.kv_bytes_per_token
            raise NoRoomForKV(
                f"kv_tokens: {pages * self.page_size} tokens need {needed / 2**30:.1f} GiB, more than {self.device} has left"
            ) from error
        self.page_table[self.rows].fill_(pages)
        self.kv_pages = KVPages(self.kv, self.page_size)
        self._saved = SavedKV(self.kv_pages)

    @torch.inference_mode()
    def measure_kv_tokens(self, mem_fraction: float, step_tokens: int, captured: int = 0) -> int:
        """Tokens of KV that fit a CUDA device: ``mem_fraction`` of its memory less what is in use at the peak of the
        largest prefill, and less what CUDA graphs of up to ``captured`` requests will take. Runs a step of ``step_tokens``
        tokens against a pool of their size.

        Raises NoRoomForKV.
        """
        torch.cuda.synchronize(self.device)
        weights = torch.cuda.memory_allocated(self.device)
        pages = -(-step_tokens // self.page_size)
        self.allocate(pages)
        pool = torch.cuda.memory_allocated(self.device) - weights
        torch.cuda.reset_peak_memory_stats(self.device)
        # As few requests as make up so many tokens. They share the pool's pages, as nobody reads the result.
        longest = min(step_tokens, self.max_context)
        requests = min(-(-step_tokens // longest), self.rows)
        lengths = [min(longest, step_tokens - i * longest) for i in range(requests)]
        table = torch.arange(self.page_table.shape[1], dtype=torch.int32, device=self.device)
        self.page_table[:requests] = table.clamp(max=pages)
        step = self._assemble(_prefill_inputs(lengths), self.device)
        hidden = None if self.parallel.first_stage else self._hidden_like(sum(lengths))
        assert self.kv is not None
        with self.sampler.with_tables():
            out = self.model.forward(step, self.kv, hidden)
            if self.parallel.last_stage:
                # Sampling works on the logits of as many requests as may run, and does to them whatever these may ask for.
                logits = self.model.logits(out[:1].expand(self.rows, -1))
                self.sampler.rehearse(logits)
                del logits
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - pool
        self.kv = self.kv_pages = self._saved = None
        del out, step, hidden, table
        torch.cuda.empty_cache()
        peak += self._graph_bytes(captured, (peak - weights) / sum(lengths)) if captured else 0
        free, total = torch.cuda.mem_get_info(self.device)
        # Other processes, and what the driver and the libraries took beside torch's allocator.
        elsewhere = total - free - torch.cuda.memory_reserved(self.device)
        room = total * mem_fraction - elsewhere - peak
        found = int(room // self.kv_bytes_per_token) - self.page_size  # the spare page
        if found < self.page_size * 16:
            raise NoRoomForKV(
                f"{self.config.source}: {(elsewhere + peak) / 2**30:.1f} GiB of {total / 2**30:.1f} are needed before KV; "
                f"raise mem_fraction ({mem_fraction:g}) or tp"
            )
        return found

    def _graph_bytes(self, captured: int, token_bytes: float) -> int:
        """About what CUDA graphs will take: their logits, a step's working memory in a pool of its own, and what the driver
        keeps of the recorded launches."""
        dtype = self.config.dtype or torch.float32
        logits = captured * self.config.vocab * dtype.itemsize
        return int(logits + captured * token_bytes + GRAPH_BYTES)

    def _hidden_like(self, tokens: int) -> Tensor:
        return torch.zeros((tokens, self.config.hidden), dtype=self.config.dtype, device=self.device)

    def capture(self, sizes: list[int]) -> None:
        """Record decode steps of these batch sizes as CUDA graphs."""
        assert self.kv is not None
        if sizes and self.device.type == "cuda" and self.parallel.pp == 1:
            dtype = self.config.dtype or torch.float32
            self.graphs = DecodeGraphs(self._decode_step, self.rows, self.config.vocab, dtype, self.device, sizes)

    def _decode_step(self, rows: Tensor, seq_lens: Tensor, logits: Tensor) -> None:
        """Compute the logits of one decode step from what the device holds, as a graph can capture it."""
        assert self.kv is not None
        positions = seq_lens - 1
        batch = ForwardBatch(
            self.last_token[rows],
            positions,
            self.slots(rows, positions),
            rows,
            seq_lens.int(),
            self.page_table,
            self.page_size,
        )
        self.model.logits(self.model.forward(batch, self.kv), logits)

    # -- running -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self,
        batch: ModelWorkerBatch,
        hidden: Tensor | None = None,
        known: np.ndarray | None = None,
        begin: Callable[[], object] = lambda: None,
    ) -> Output:
        """Run one batch on this rank. Batches come in the order of their launch.

        ``hidden``: from the stage before. ``known``: int64[decodes], the decode rows' inputs, given where another rank
        samples; else the last tokens sampled here are used. ``begin`` is called when the step's inputs are on their way
        and its computation is launched next. On CUDA nothing here waits for the device.
        """
        assert self.kv is not None, "allocate before running"
        self.sampler.start(batch.new_requests)
        self._prompts.start(batch.new_requests)
        prompt_logprobs = None
        if batch.kv_copies:
            assert self._saved is not None
            self._saved.make(batch.kv_copies)
        self._write_pages(batch)
        if batch.new_requests and batch.decodes and known is None:
            self._continue(batch)
        if known is not None and len(known):
            rows = to_device(batch.rows[batch.num_prefill :], self.device)
            self.last_token[rows] = to_device(known, self.device)
        if self.graphs is not None and not batch.num_prefill and batch.decode_tokens <= self.graphs.largest:
            rows, seq_lens, logits = self.graphs.replay(batch, begin)
        else:
            step = self._assemble(_Inputs.of(batch), self.device)
            begin()
            out = self.model.forward(step, self.kv, hidden)
            if not self.parallel.last_stage:
                return Output(out, None)
            rows, seq_lens = step.rows, step.seq_lens
            prompt_logprobs = self._prompts.of(batch, out, self.model.logits)
            logits = self.model.logits(out if step.sample_at is None else out[step.sample_at])
        step_logits = _StepLogits(batch, logits, rows, seq_lens, prompt_logprobs)
        if batch.masked is None:
            return self._sample(step_logits, None)
        self._unsampled = step_logits
        return Output(None, None)

    @torch.inference_mode()
    def sample(self, masks: np.ndarray | None) -> Output:
        """Sample the batch with masked rows that was run last; ``masks`` as in ``Backend.sample``. It comes before the next
        run, which may write the logits anew."""
        step_logits, self._unsampled = self._unsampled, None
        assert step_logits is not None, "no batch waits for masks"
        return self._sample(step_logits, masks)

    def _sample(self, at: _StepLogits, masks: np.ndarray | None) -> Output:
        batch, rows = at.batch, at.rows
        if masks is not None and batch.masked is not None:
            forbid(at.logits, batch.masked, masks, self.ops)
        tokens, logprobs = self.sampler.sample(at.logits, batch, rows, at.seq_lens)
        if batch.unsampled is None:
            self.last_token[rows] = tokens
        else:
            # A chunk that is not the last has no sample.
            keep = np.ones(len(batch.rows), bool)
            keep[batch.unsampled] = False
            index = to_device(keep.nonzero()[0], self.device)
            self.last_token[rows[index]] = tokens[index]
        return Output(None, tokens, logprobs, at.prompt_logprobs)

    def _continue(self, batch: ModelWorkerBatch) -> None:
        """Take in the newest token of each row that begins with a decode: it came from elsewhere with the row's KV."""
        decodes = set(batch.rows[batch.num_prefill :].tolist())
        begun = [(new.row, int(new.tokens[-1])) for new in batch.new_requests if new.row in decodes]
        if begun:
            rows, tokens = np.array(begun, np.int64).T.copy()
            self.last_token[to_device(rows, self.device)] = to_device(tokens, self.device)

    def _write_pages(self, batch: ModelWorkerBatch) -> None:
        """Bring the device's page table up to date, in one scatter."""
        width = self.page_table.shape[1]
        at, pages = [], []
        for write in batch.page_writes:
            at.append(write.row * width + write.first_page + np.arange(len(write.pages)))
            pages.append(write.pages)
        if batch.decode_page_rows is not None and batch.decode_pages is not None and len(batch.decode_pages):
            lens = batch.seq_lens[batch.num_prefill :]
            if len(batch.decode_pages) < len(lens):
                lens = lens[lens % self.page_size == 1]
            at.append(batch.decode_page_rows * width + (lens - 1) // self.page_size)
            pages.append(batch.decode_pages)
        if not at:
            return
        where, what = np.concatenate(at), np.concatenate(pages)
        if len(batch.page_writes) > 1:
            # A later write of the same entry wins: a scatter promises no order.
            where, last = np.unique(where[::-1], return_index=True)
            what = what[::-1][last]
        flat = self.page_table.view(-1)
        flat[to_device(where.astype(np.int64), self.device)] = to_device(what.astype(np.int32), self.device)

    def _assemble(self, inputs: _Inputs, device: torch.device) -> ForwardBatch:
        """Tensors of a step from one packed transfer."""
        packed = to_device(np.concatenate(inputs), device)
        rows, seq_lens, q_starts, token_rows, positions, input_ids = packed.split([len(part) for part in inputs])
        num_prefill, prefill_tokens = max(len(inputs.q_starts) - 1, 0), len(inputs.token_rows)
        decode_rows = rows[num_prefill:]
        if len(decode_rows):
            token_rows = torch.cat((token_rows, decode_rows))
            positions = torch.cat((positions, seq_lens[num_prefill:] - 1))
            input_ids = torch.cat((input_ids, self.last_token[decode_rows]))
        sample_at = None
        if num_prefill:
            ends = torch.arange(prefill_tokens, len(positions), device=device)
            sample_at = torch.cat((q_starts[1:] - 1, ends))
        extends = np.diff(inputs.q_starts)
        return ForwardBatch(
            input_ids,
            positions,
            self.slots(token_rows, positions),
            rows,
            seq_lens.int(),
            self.page_table,
            self.page_size,
            num_prefill,
            prefill_tokens,
            q_starts.int() if num_prefill else None,
            int(extends.max()) if num_prefill else 1,
            sample_at,
        )

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """int64[n], the KV slot of each (table row, position)."""
        size = self.page_size
        return self.page_table[rows, positions // size].long() * size + positions % size


class _Inputs(tuple):
    """int64 arrays that the host sends for a step: rows and seq_lens of the requests, then of the prefills: where each
    begins, and row, position and id of every token."""

    __slots__ = ()

    @property
    def q_starts(self) -> np.ndarray:
        return self[2]

    @property
    def token_rows(self) -> np.ndarray:
        return self[3]

    @classmethod
    def of(cls, batch: ModelWorkerBatch) -> _Inputs:
        rows, seq_lens = batch.rows.astype(np.int64), batch.seq_lens.astype(np.int64)
        empty = np.empty(0, np.int64)
        if not batch.num_prefill:
            return cls((rows, seq_lens, empty, empty, empty, empty))
        assert batch.input_ids is not None
        extend = batch.query_lens[: batch.num_prefill]
        q_starts = np.concatenate(([0], np.cumsum(extend)))
        first = seq_lens[: batch.num_prefill] - extend
        positions = np.arange(q_starts[-1]) + np.repeat(first - q_starts[:-1], extend)
        token_rows = np.repeat(rows[: batch.num_prefill], extend)
        return cls((rows, seq_lens, q_starts, token_rows, positions, batch.input_ids.astype(np.int64)))


def _prefill_inputs(lengths: list[int]) -> _Inputs:
    """Prompts of these lengths in the first rows."""
    counts, rows = np.array(lengths), np.arange(len(lengths))
    starts = np.concatenate(([0], counts.cumsum()))
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return _Inputs((rows, counts, starts, np.repeat(rows, counts), positions, np.zeros(starts[-1], np.int64)))
