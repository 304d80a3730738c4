"""The scheduler process's outbox: what each step has brought, on its way to the detokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.scheduler.batch import Logprobs, ModelWorkerBatch, StepOutput
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.serving.engine.live_record import LiveRecord
from workbench.serving.engine.vitals import Vitals
from workbench.serving.wire import Ended, Opened, PromptLogprobs, Step, Submit, TokenLogprob, encode


class LiveOutbox:
    """Outbox that sends what each step has brought to the detokenizer, and keeps the counts.

    Which sequence a token belongs to is looked up by table row, for a whole batch at once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        socket: Any,
        vitals: Vitals,
        record: LiveRecord | None,
    ) -> None:
        self._scheduler = scheduler
        self._socket = socket
        self._vitals = vitals
        self._record = record
        self._sequences: dict[str, int] = {}
        """The number of each that is open, by its id."""
        self._logprobs: dict[int, int] = {}
        """By sequence, how many alternatives were asked for."""
        self._sequence_of_row = np.zeros(scheduler.kv.table.rows, np.int64)
        self._epoch = -1
        self._epoch_sequences = b""
        """Of the rows of the batches of ``_epoch``."""

    def opened(self, message: Submit, generate: Generate) -> None:
        """Note a sequence that has come, which the scheduler takes as ``generate``."""
        self._sequences[message.sequence_id] = message.sequence
        if message.params.logprobs is not None:
            self._logprobs[message.sequence] = message.params.logprobs
        self._socket.send(
            encode(
                Opened(
                    message.sequence,
                    message.sequence_id,
                    message.stop,
                    message.params.min_new_tokens,
                    message.skip_special_tokens,
                    message.include_stop,
                )
            )
        )
        if self._record is not None:
            self._record.arrived(generate, message.slo_ttft_s, message.slo_tpot_s)

    def changed(self, settings: dict[str, Any]) -> None:
        """Note that the scheduler goes on with other settings."""
        if self._record is not None:
            self._record.changed(settings)

    def weights_updated(self, folder: str) -> None:
        """Note that the model goes on with other weights."""
        if self._record is not None:
            self._record.weights_updated(folder)

    def scheduled(self, batch: ScheduleBatch) -> None:
        for new in batch.worker.new_requests:
            self._sequence_of_row[new.row] = self._sequences[new.request_id]
        if batch.worker.new_requests:
            self._epoch = -1
        self._vitals.retractions += len(batch.retracted)
        if self._record is not None:
            self._record.scheduled(batch)

    def send(self, result: StepResult) -> None:
        sequences, tokens, count = b"", b"", 0
        logprobs = None
        if result.batch is not None and result.output is not None:
            kept = _kept(result.batch, result.output)
            logprobs = self._asked_logprobs(result.batch.worker, kept, result.output)
            sequences, tokens, count = self._pairs(result.batch.worker, kept, result.output)
        prompts = None
        if result.output is not None and result.output.prompt_logprobs is not None:
            assert result.batch is not None
            prompts = self._prompt_logprobs(result.batch, result.output.prompt_logprobs)
        self._send_step(sequences, tokens, count, logprobs, result, prompts)

    def _send_step(
        self,
        sequences: bytes,
        tokens: bytes,
        count: int,
        logprobs: dict[int, list[TokenLogprob]] | None,
        result: StepResult,
        prompts: list[PromptLogprobs] | None = None,
    ) -> None:
        """Send ``count`` tokens, and what else a result says."""
        first = [(self._sequences[req.rid], req.input_len, req.cached_tokens) for req in result.first]
        ended = [self._forget(req) for req in result.ended]
        # Noted before it is sent: a client may have it before the next line runs.
        at_s = self._record.now_s() if self._record is not None else 0.0
        if count or ended or prompts:
            self._socket.send(encode(Step(sequences, tokens, first, ended, logprobs, prompts)))
        vitals = self._vitals
        vitals.generated_tokens += count
        computed = [req for req in result.ended if not req.output_len and req.finish and req.finish.kind == "length"]
        for req in (*result.first, *computed):
            vitals.prompt_tokens += req.input_len
            vitals.cached_prompt_tokens += req.cached_tokens
        if self._record is not None:
            self._record.send(result, at_s)

    def _pairs(self, batch: ModelWorkerBatch, kept: np.ndarray | None, output: StepOutput) -> tuple[bytes, bytes, int]:
        tokens = output.tokens.astype(np.int32, copy=False)
        if output.counts is not None:
            return np.repeat(self._sequence_of_row[batch.rows], output.counts).tobytes(), tokens.tobytes(), len(tokens)
        if kept is not None:
            return self._sequence_of_row[batch.rows[kept]].tobytes(), tokens[kept].tobytes(), len(kept)
        if batch.epoch != self._epoch:
            self._epoch, self._epoch_sequences = batch.epoch, self._sequence_of_row[batch.rows].tobytes()
        return self._epoch_sequences, tokens.tobytes(), len(tokens)

    def _forget(self, req: Req) -> Ended:
        assert req.finish is not None
        sequence = self._sequences.pop(req.rid)
        self._logprobs.pop(sequence, None)
        stop_ids = req.stop_ids if req.finish.kind == "stop" else ()
        return Ended(sequence, req.finish.kind, req.finish.detail, req.input_len, req.cached_tokens, stop_ids)

    def _asked_logprobs(
        self, batch: ModelWorkerBatch, kept: np.ndarray | None, output: StepOutput
    ) -> dict[int, list[TokenLogprob]] | None:
        if output.logprobs is None or not self._logprobs:
            return None
        of_token = self._sequence_of_row[batch.rows]
        if output.counts is not None:
            of_token = np.repeat(of_token, output.counts)
        found: dict[int, list[TokenLogprob]] = {}
        for i in range(len(of_token)) if kept is None else kept.tolist():
            count = self._logprobs.get(sequence := int(of_token[i]))
            if count is not None:
                found.setdefault(sequence, []).append(_told(output.logprobs, i, count))
        return found

    def _prompt_logprobs(self, batch: ScheduleBatch, found: dict[int, tuple[int, Logprobs]]) -> list[PromptLogprobs]:
        told = []
        for index, (first, values) in found.items():
            req = batch.reqs[index]
            sequence = self._sequences.get(req.rid)
            if sequence is not None and not (batch.dropped and index in batch.dropped):
                ids = req.prompt[first : first + len(values.sampled)].tolist()
                each = [_told(values, i, values.top.shape[1]) for i in range(len(ids))]
                told.append(PromptLogprobs(sequence, first, ids, each))
        return told


def _told(values: Logprobs, i: int, count: int) -> TokenLogprob:
    """Return one token's, with so many alternatives."""
    return TokenLogprob(
        float(values.sampled[i]),
        [int(t) for t in values.top_ids[i][:count]],
        [float(v) for v in values.top[i][:count]],
    )


def _kept(batch: ScheduleBatch, output: StepOutput) -> np.ndarray | None:
    """Return int[k], the samples that are tokens of their sequences, of one sample a row; None where all are.

    Where rows have counts, they are of such tokens alone.
    """
    if output.counts is not None or (batch.worker.unsampled is None and not batch.dropped):
        return None
    emits = np.ones(len(batch.worker.rows), bool)
    if batch.worker.unsampled is not None:
        emits[batch.worker.unsampled] = False
    if batch.dropped:
        emits[list(batch.dropped)] = False
    return emits.nonzero()[0]
