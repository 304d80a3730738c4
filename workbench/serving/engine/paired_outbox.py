"""The outboxes of instances that prefill or decode alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from workbench.scheduler.disaggregated.letters import TokenLogprobs
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult
from workbench.serving.engine.outbox import LiveOutbox
from workbench.serving.wire import TokenLogprob


class PrefillLiveOutbox(LiveOutbox):
    """:class:`LiveOutbox` that says when requests have been handed over, and sends no token: the other half does."""

    def scheduled(self, batch: ScheduleBatch) -> None:
        self._vitals.retractions += len(batch.retracted)
        if self._record is not None:
            self._record.scheduled(batch)

    def send(self, result: StepResult) -> None:
        # Nobody here waits for what a decode instance has had prefilled again.
        clients = [req for req in result.ended if req.rid in self._sequences]
        self._send_step(b"", b"", 0, None, dataclasses.replace(result, ended=clients))
        for req in result.ended:
            if req.finish is not None and req.finish.kind == "handed_over":
                self._vitals.prompt_tokens += req.input_len
                self._vitals.cached_prompt_tokens += req.cached_tokens


class DecodeLiveOutbox(LiveOutbox):
    """:class:`LiveOutbox` that also sends the tokens that came with the KV of requests which join."""

    def send(self, result: StepResult) -> None:
        if not result.joined:
            super().send(result)
            return
        fresh = [(req, token, logprobs) for req, token, logprobs in result.joined if token is not None]
        numbers = [self._sequences[req.rid] for req, *_ in fresh]
        told = {
            number: [_told(logprobs)]
            for number, (_, _, logprobs) in zip(numbers, fresh, strict=True)
            if logprobs is not None and number in self._logprobs
        }
        tokens = np.array([token for _, token, _ in fresh], np.int32)
        self._send_step(np.array(numbers, np.int64).tobytes(), tokens.tobytes(), len(fresh), told or None, result)


def _told(logprobs: TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(logprobs.sampled, list(logprobs.top_ids), list(logprobs.top))
