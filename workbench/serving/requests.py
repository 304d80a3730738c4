"""Requests of clients, whatever protocol they speak, and the checks before anything of them reaches the scheduler.

A *request* is what a client sends at once. It is answered by one or more *sequences*: each of its prompts, ``n`` times. A
request that continues a session is the session's next *turn*.
"""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import dataclass
from typing import Literal

from workbench.handover.addresses import split_address
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import Role
from workbench.scheduler.request import SamplingParams
from workbench.serving.refusals import bad_value

ControlAction = Literal["flush_cache", "pause", "resume"]
"""What may be asked of the scheduler as a whole."""
SessionAction = Literal["open", "close"]
MAX_SEQUENCES = 256
"""Prompts times choices of one request."""
ROOM_BITS = 8
"""The sequences of a request have so many bits of the numbers of their rooms."""
PAIRS_HAVE_NONE = "instances of role prefill and decode keep no sessions"
MAX_SESSION_CHARACTERS = 200
MAX_SALT_CHARACTERS = 1000
_WELL_FORMED = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True)
class Limits:
    """Limits of the engine."""

    capacity: Capacity
    """The scheduler's own: it decides what fits."""
    vocab: int
    logprobs: bool
    backend: str
    default_max_tokens: int
    ignore_eos: bool
    """Of requests that do not say."""
    role: Role = "both"


@dataclass(frozen=True)
class Shared:
    """The other half of a request, where one instance prefills it and another decodes it."""

    router: str
    """Who has given it its room."""
    room: int
    """Of its first sequence; each of the others has the next one."""
    peer: str
    """``host:port`` of the other instance, as that calls itself."""


@dataclass(frozen=True)
class ServiceRequest:
    """One request. :meth:`check` holds it to what can be served."""

    prompts: list[list[int]]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    skip_special_tokens: bool = True
    request_id: str | None = None
    """The client's name for it; None: it gets one."""
    label: str | None = None
    """Another name that the client's side has for it (``x-request-id``): an abort and the record take it, too."""
    session: str | None = None
    """The open session whose next turn it is."""
    bos_tokens: int = 0
    """Leading tokens of the prompt that only a text's beginning has: left out of a later turn."""
    cache_salt: str | None = None
    """Prefixes are shared with requests of the same salt only."""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    """Its own objectives."""
    prompt_parameter: str = "prompt"
    """What the client calls the prompt."""
    grammar: str = ""
    """What the output may be (:meth:`Service.grammar`); empty: anything."""
    include_stop: bool = False
    """The stop string or stop token that ends the output is part of its text."""
    shared: Shared | None = None

    def check(self, limits: Limits) -> None:
        """Raise Refusal for what can never be served."""
        for prompt in self.prompts:
            check_prompt(prompt, limits, self.params.max_new_tokens, self.prompt_parameter)
        check_choices(self.n, len(self.prompts))
        if not -(1 << 31) <= self.priority < 1 << 31:
            raise bad_value("priority", f"{self.priority} does not fit 32 bits")
        check_id("request_id", self.request_id)
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= MAX_SALT_CHARACTERS:
            raise bad_value("cache_salt", f"must have between 1 and {MAX_SALT_CHARACTERS} characters")
        for name, value in (("slo_ttft_s", self.slo_ttft_s), ("slo_tpot_s", self.slo_tpot_s)):
            if value is not None:
                check_objective(name, value)
        if limits.role != "both":
            self._check_shared()
        if self.session is not None:
            check_session(self.session)
            if len(self.prompts) > 1:
                raise bad_value(self.prompt_parameter, f"a session takes one prompt at a time, not {len(self.prompts)}")
            if self.n > 1:
                raise bad_value("n", f"a session goes on from one choice, not from {self.n}")

    def _check_shared(self) -> None:
        """Raise Refusal for what the instances of a pair do not hand over yet."""
        if self.session is not None:
            raise bad_value("session_id", PAIRS_HAVE_NONE, "unsupported_parameter")
        if self.params.prompt_logprobs is not None:
            raise bad_value(
                "echo", "with logprobs, those of the prompt, which is computed elsewhere", "unsupported_parameter"
            )


def check_choices(n: int, prompts: int) -> None:
    """Raise Refusal for a number of choices that so many prompts cannot have."""
    if n < 1:
        raise bad_value("n", f"{n} is less than 1")
    if n * prompts > MAX_SEQUENCES:
        raise bad_value("n", f"{prompts} prompts times n of {n} are more than {MAX_SEQUENCES} sequences")


def check_prompt(prompt: list[int], limits: Limits, max_new_tokens: int, parameter: str) -> None:
    """Raise Refusal for a prompt that can never be served."""
    if not prompt:
        raise bad_value(parameter, "is empty")
    check_length(len(prompt), limits, max_new_tokens, parameter)
    if min(prompt) < 0 or max(prompt) >= limits.vocab:
        check_token(parameter, next(token for token in prompt if not 0 <= token < limits.vocab), limits)


def check_length(tokens: int, limits: Limits, max_new_tokens: int, parameter: str, at_least: bool = False) -> None:
    """Raise Refusal for so many tokens of a prompt, or ``at_least`` so many, where the scheduler would reject it."""
    longest = limits.capacity.longest_prompt(max_new_tokens)
    if tokens > longest:
        raise bad_value(
            parameter,
            f"{'at least ' * at_least}{tokens} tokens are more than the {longest} that fit the context with an answer",
            "context_length_exceeded",
        )


def check_token(parameter: str, token: int, limits: Limits) -> None:
    """Raise Refusal for what is no token of the model."""
    if not 0 <= token < limits.vocab:
        raise bad_value(parameter, f"{token} is not a token of the vocabulary of {limits.vocab}")


def check_id(name: str, given: str | None) -> str | None:
    """Return an id given as ``name``, which logs and headers can carry. Raises Refusal for one that is no plain word."""
    if given is not None and not is_plain(given):
        raise bad_value(name, "must have between 1 and 200 printable ASCII characters and no space")
    return given


def is_plain(given: str) -> bool:
    """Return whether an id is one plain word of at most 200 characters."""
    return _WELL_FORMED.fullmatch(given) is not None


def check_objective(name: str, value: float) -> float:
    """Return an objective in seconds. Raises Refusal for what is no positive number."""
    if not 0 < value < math.inf:
        raise bad_value(name, f"{value:g} is not positive and finite")
    return float(value)


def check_address(name: str, given: str) -> str:
    """Return the address of an instance. Raises Refusal for what is no ``host:port``."""
    try:
        split_address(given)
    except ValueError as error:
        raise bad_value(name, str(error)) from None
    return given


def check_session(name: str) -> str:
    """Return a session's name. Raises Refusal for a bad one."""
    if not 0 < len(name) <= MAX_SESSION_CHARACTERS:
        raise bad_value("session_id", f"must have between 1 and {MAX_SESSION_CHARACTERS} characters")
    return name


def new_session(asked: str | None) -> str:
    """Return the name of a session to be opened: a made one when none is asked for. Raises Refusal for a bad one."""
    return uuid.uuid4().hex if asked is None else check_session(asked)
