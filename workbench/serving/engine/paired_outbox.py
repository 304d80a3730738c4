"""The outboxes of instances that prefill or decode alone."""

from __future__ import annotations

import numpy as np

from workbench.scheduler.disaggregated.letters import TokenLogprobs
from workbench.scheduler.scheduler import StepResult
from workbench.serving.engine.outbox import LiveOutbox
from workbench.serving.wire import TokenLogprob


class PrefillLiveOutbox(LiveOutbox):
    """:class:`LiveOutbox` that says when requests have been handed over, and sends no token: the other half does."""

    def send(self, result: StepResult) -> None:
        self._send_step(b"", b"", 0, None, result)
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
