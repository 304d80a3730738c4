"""The way of a request of a trace: carried whole from its reader to its end, and put into words for a scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from traces import TraceRequest
from traces.requests.ahead import with_tokens
from workbench.clients.bounds import Bound, bound_of
from workbench.clients.unchecked import Unchecked
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams

END_OF_SEQUENCE = -2
"""Token id that ends a request where its trace says. No vocabulary has it, so content from a trace cannot end one early."""


@dataclass(slots=True, eq=False)
class ClientRequest:
    """A request of a trace and all that belongs to it while it is under way."""

    trace: TraceRequest
    prompt: np.ndarray | None = None
    """int32[n]; None until it is made."""
    output: np.ndarray | None = None
    """int32[n], what the trace says that it writes; None until it is made, and where a model writes."""
    session: Session | None = None
    message: Generate | None = None
    """As it was sent."""
    bound: Bound | None = None
    """Of its output; None where nobody knows what it would write."""
    instance: int = 0
    """Where it was sent; of a pair that shares it, the one that decodes."""
    attempts: int = 0
    """How often it was sent to a pair."""
    answered: bool = False
    """Its first token has come back from where it was sent last, or it has ended without one."""
    number: int = 0
    """How many of the run came before it."""


@dataclass(slots=True, eq=False)
class Session:
    """A session whose turns follow each other."""

    turns: deque[ClientRequest] = field(default_factory=deque)
    """Read and not started."""
    running: bool = True
    ended_s: float = 0.0


@dataclass(frozen=True)
class Wording:
    """Settings of a run that shape the message which a request of a trace becomes."""

    vocab: int
    """Token ids that the model has."""
    seed: int = 0
    """Of prompts that the trace has lengths of."""
    max_tokens: int | None = None
    """Output bound of requests that have none of their own."""
    ignore_eos: bool = False
    slo_ttft: float | None = None
    """Seconds until the first token of requests that have no such objective of their own."""

    def prompt(self, request: ClientRequest) -> np.ndarray:
        """int32[n], made if it was not made ahead."""
        if request.prompt is None:
            request.prompt = request.trace.prompt_tokens(self.vocab, self.seed)
        return request.prompt

    def script(self, request: ClientRequest) -> np.ndarray:
        """int32[n], what the request writes, ended by the model where the trace ends it."""
        self.make_tokens(request)
        assert request.output is not None
        if self.ignore_eos:
            return request.output
        tokens = request.output.copy()
        tokens[-1] = END_OF_SEQUENCE
        return tokens

    def make_tokens(self, request: ClientRequest) -> None:
        """Make prompt and output at once, if they were not made ahead."""
        if request.output is None:
            request.prompt, request.output = request.trace.tokens(self.vocab, self.seed)

    def message(self, request: ClientRequest, arrival_s: float) -> Generate:
        """Say a request in the scheduler's words, and note on it what was said. It decodes greedily: what it writes is
        the trace's or the model's own."""
        trace = request.trace
        request.bound = bound = bound_of(trace, self.max_tokens, self.ignore_eos)
        request.message = message = Generate(
            trace.request_id,
            self.prompt(request),
            SamplingParams(bound.tokens, self.ignore_eos, temperature=0.0),
            arrival_s,
            trace.priority,
            trace.adapter or "",
            trace.slo_ttft_s if trace.slo_ttft_s is not None else self.slo_ttft,
            grammar=Unchecked() if trace.constrained else None,
        )
        return message

    def read(self, trace: Iterable[TraceRequest]) -> Iterator[ClientRequest]:
        """The requests of a trace, with their tokens where making them ahead pays."""
        for request, tokens in with_tokens(trace, self.vocab, self.seed):
            yield ClientRequest(request, *(tokens or ()))


def request_of(
    message: Generate, adapter: str | None, slo_ttft_s: float | None, slo_tpot_s: float | None
) -> ClientRequest:
    """The request of a trace that a message was: the other way round, for a record of live traffic. How much it writes is
    known at its end (1 stands for it until then), and its content is the message's prompt."""
    trace = TraceRequest(
        message.rid,
        message.arrival_s,
        len(message.prompt),
        1,
        message.params.max_new_tokens,
        message.session or None,
        priority=message.priority,
        adapter=adapter,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
        constrained=message.grammar is not None,
    )
    return ClientRequest(trace, message.prompt, message=message)
