"""The process between clients and a scheduler: HTTP, tokenizer, detokenizer, streams. One process, with a queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FrontEndModel:
    """Seconds that things take it. What keeps the process busy makes everything after it wait."""

    request_s: float = 0.0
    """Per request: connection, parsing, checking, handing it on."""
    prompt_token_s: float = 0.0
    """Per prompt token: tokenizing."""
    chunk_s: float = 0.0
    """Per streamed chunk, a request's tokens of one step: detokenizing, writing it out."""
    latency_s: float = 0.0
    """Per request, before it gets to the process and beside it: the client, the network, hops between processes."""


class FrontEnd:
    """The process at work. It takes things in the order of the calls, whose moments never go back."""

    def __init__(self, model: FrontEndModel) -> None:
        self.model = model
        self.free_s = 0.0
        """From when on it has nothing left to do."""

    def request(self, now_s: float, prompt_tokens: int) -> float:
        """A request comes to the process. Returns when the scheduler has it."""
        model = self.model
        self.free_s = max(now_s, self.free_s) + model.request_s + model.prompt_token_s * prompt_tokens
        return self.free_s

    def result(self, now_s: float, chunks: int) -> float:
        """The result of a step comes from the scheduler. Returns when its clients have it."""
        self.free_s = max(now_s, self.free_s) + self.model.chunk_s * chunks
        return self.free_s

    def results(self, moments_s: Sequence[float], chunks: int) -> list[float]:
        """Results of as many steps as there are moments, of so many chunks each."""
        return [self.result(now_s, chunks) for now_s in moments_s]
