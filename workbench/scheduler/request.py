"""A request, how it is sampled, and the conversation it may be a turn of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from workbench.scheduler.config import DEFAULT_MAX_NEW_TOKENS
from workbench.scheduler.grammar import Grammar
from workbench.scheduler.prefix_node import Node

FinishKind = Literal["length", "stop", "aborted", "rejected", "handed_over"]
"""``handed_over``: on a prefill instance, whose decode instance goes on with it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of the choice of a request's tokens and of its end."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    """0: the prompt is computed, and nothing is sampled."""
    ignore_eos: bool = False
    """Stop by length alone: end-of-sequence and stop tokens are emitted like any other."""
    stop_token_ids: tuple[int, ...] = ()
    """Stops beside the model's end-of-sequence tokens."""
    min_new_tokens: int = 0
    """No stop token is sampled before this many tokens are out."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this probable relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of tokens in the prompt or the output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, once for each occurrence."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch. None: the engine draws one."""
    logprobs: int | None = None
    """Report the sampled token's log probability and those of this many alternatives; None: neither."""
    prompt_logprobs: int | None = None
    """Report the same of the prompt's tokens but the first. Of those that are found in the prefix cache nothing is known."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Reason for which a request ended."""

    kind: FinishKind
    detail: str = ""

    @property
    def status(self) -> str:
        """The word of the run record: ``finished``, ``handed_over``, or ``aborted``/``rejected`` and why."""
        if self.kind in ("length", "stop"):
            return "finished"
        return self.kind if self.kind == "handed_over" else f"{self.kind}:{self.detail}"


class Pair(NamedTuple):
    """The other instance of a request that a prefill and a decode instance share."""

    room: tuple[int, int]
    """Names the handover: its number in the cluster, and how often the request went back to a prefill instance since."""
    peer: int
    """Number of the other instance."""
    here: int
    """Number of this one."""


@dataclass(slots=True, eq=False)
class Session:
    """One conversation."""

    name: str
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32: prompt and output of its last request that finished."""
    turns: int = 0
    """Requests of it that have finished."""
    busy: bool = False
    """A request of it is waiting or running."""
    last_rid: str = ""
    """The last request that finished."""
    last_input_len: int = 0
    """Tokens of that one's prompt."""


@dataclass(slots=True, eq=False)
class Req:
    """One request inside the scheduler.

    What changes on every decode step (length, pages, last token) is not here but in the arrays of the running set; the
    fields below are brought up to date when a request enters or leaves it.
    """

    rid: str
    prompt: np.ndarray
    """int32[input tokens]."""
    params: SamplingParams
    max_new: int
    """Output bound after clamping to the context."""
    seq: int
    """Arrival number: orders requests whose arrival times are equal."""
    arrival_s: float = 0.0
    priority: int = 0
    """Higher goes first."""
    namespace: str = ""
    """Prefixes are shared only within a namespace (an adapter, a salt)."""
    deadline_s: float = float("inf")
    """When its first token is due, on the scheduler's clock."""
    stop_ids: tuple[int, ...] = ()
    """Every token id that ends it; empty when it ignores them."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32: what must be in KV before it decodes: the prompt and, after a retraction, its output so far."""
    row: int = -1
    """Row of the page table and token pool, -1 without one."""
    slot: int = 0
    node: Node | None = None
    """Deepest locked node of the prefix cache."""
    shared_pages: int = 0
    """Leading pages of its row that belong to the prefix cache; the rest are its own."""
    page_names: list[bytes] = field(default_factory=list)
    """Names of its first full pages, as far as a prefix cache that goes by names has asked for them."""
    turn: int = 0
    """Number of its admission, of all admissions: the order in which requests got in."""
    kv_len: int = 0
    """Tokens whose KV is computed or launched (outside the running set)."""
    spare_tokens: int = 0
    """Tokens that its pages cover beyond ``kv_len``: drafted ones that did not hold (outside the running set)."""
    output_len: int = 0
    """Tokens emitted, as of the last event that touched this request."""
    cached_tokens: int = 0
    """Prompt tokens its first admission took from the prefix cache."""
    scheduled: bool = False
    retractions: int = 0
    queued: int = 0
    """Number of its last entry into the queue."""
    last_need: int = 0
    """Tokens that it had still to be computed of it when it was last looked at."""
    overrun: int = 0
    """Steps that it is launched for after its last one, until its end by length is known."""
    passed_over: int = 0
    """Prefill batches that admitted a later arrival while this one waited."""
    pending_token: bool = False
    """Retracted while a batch in flight still samples for it."""
    session: Session | None = None
    """The session it is a turn of; ``prompt`` has the session's tokens."""
    grammar: Grammar | None = None
    """What it may write, and how far it has got; None: anything."""
    pair: Pair | None = None
    """Where its other half is, on instances that prefill or decode alone."""
    written_tokens: int = 0
    """Tokens at the end of ``prompt`` that are output, on an instance that prefills it again for another one."""
    given_back: bool = False
    """Its KV has been given back while a batch in flight holds it; its row comes back with that batch."""
    finish: Finish | None = None

    @property
    def input_len(self) -> int:
        return len(self.prompt)

    @property
    def end_len(self) -> int:
        """KV length with which it is launched for the last time: the last token is an input only where it overruns."""
        return len(self.prompt) + max(self.max_new, 1) - 1 + self.overrun

    def output_at(self, kv_len: int) -> int:
        """Tokens it has been given when so many are in KV and the last step's sample is known."""
        return min(kv_len + 1 - len(self.prompt), self.max_new)
