"""Routers: the choice of the instance that a request goes to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, get_args
from zlib import crc32

import numpy as np

from workbench.scheduler.own_code import make_own
from workbench.scheduler.settings import ConfigError, is_own
from workbench.settings.run_settings import RouterKind

ROUTERS = get_args(RouterKind)
BLOCK_TOKENS = 128
"""Granularity at which the router remembers prompts."""
REMEMBERED_BLOCKS = 200_000
"""Blocks remembered per instance, least recently used first out."""
CACHE_THRESHOLD = 0.3
"""Share of a prompt that an instance must have seen before it is sent there for its cache."""
PACE_WEIGHT = 0.2
"""Weight of the newest answer in what is expected of the next."""
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
"""Load is uneven when the busiest instance has so many requests more than the idlest and so many times as many: then
cache affinity gives way. These three are the defaults of SGLang's router."""


class Routes(Protocol):
    """A chooser of an instance for each request. One's own is made with the number of instances, and has :meth:`choose` and
    :meth:`ended` alone."""

    closed: set[int]
    """Instances that get nothing new, unless all are."""

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        """The instance, from 0 on, for a prompt (int32[n], its tokens); requests of different namespaces share no KV."""
        ...

    def ended(self, instance: int, prompt_tokens: int) -> None:
        """Note that a request which was sent to ``instance`` has ended; its prompt had so many tokens."""
        ...


class Answered(Protocol):
    """A router that is told when a request has been answered for the first time, not only when it ends."""

    def answered(self, instance: int, prompt_tokens: int) -> None:
        """Note that the first token of a request has come back from ``instance``, or that it ended without one; its prompt
        had so many tokens."""
        ...


def make_router(kind: str, instances: int, clock: Callable[[], float] = lambda: 0.0) -> Routes:
    """The router of that kind, or the class ``module:Class``, for so many instances; ``clock`` tells the time. Raises
    ConfigError."""
    if not is_own(kind):
        return Router(kind, instances, clock)
    methods = {"choose": ("prompt", "namespace"), "ended": ("instance", "prompt_tokens")}
    return _Checked(kind, make_own("router", kind, methods, instances=instances), instances)


def told_of_answers(router: Routes) -> Answered | None:
    """The router, if it wants to know of first tokens."""
    if isinstance(router, Router) and router.kind != "expected_ttft":
        return None
    return cast(Answered, router) if hasattr(router, "answered") else None


class _Checked:
    """A router of one's own. Raises ConfigError when it chooses an instance that there is not."""

    def __init__(self, spec: str, router: Routes, instances: int) -> None:
        self._spec, self._router, self._instances = spec, router, instances
        self.ended = router.ended
        self.closed: set[int] = set()
        """Instances that take nothing, which it is not told."""

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        """The instance that it chooses; in place of one that is closed the next that is not."""
        chosen = self._router.choose(prompt, namespace)
        if chosen not in range(self._instances):
            raise ConfigError(
                f"router: {self._spec}.choose returned {chosen!r}, which is none of the instances 0 to {self._instances - 1}"
            )
        if chosen in self.closed:
            turns = ((chosen + turn) % self._instances for turn in range(self._instances))
            return next((number for number in turns if number not in self.closed), int(chosen))
        return int(chosen)


@dataclass
class Pace:
    """How soon an instance answers, as seen from outside."""

    token_s: float | None = None
    """Seconds that an answer took for each prompt token that had to be computed until then; None before the first."""
    waiting_tokens: int = 0
    """Of requests that have not been answered."""
    _waiting: list[tuple[int, int, int, float]] = field(default_factory=list)
    """(prompt tokens, those of them to be computed, all that had to be computed with it in the end, when it was sent)."""

    def sent(self, prompt_tokens: int, new_tokens: int, now_s: float) -> None:
        """A request is sent, of whose prompt so many tokens should have to be computed."""
        self.waiting_tokens += new_tokens
        self._waiting.append((prompt_tokens, new_tokens, self.waiting_tokens, now_s))

    def answered(self, prompt_tokens: int, now_s: float) -> None:
        """The first request that waits with so long a prompt has been answered."""
        place = next((place for place, one in enumerate(self._waiting) if one[0] == prompt_tokens), None)
        if place is None:
            return
        _, new_tokens, ahead, sent_s = self._waiting.pop(place)
        self.waiting_tokens -= new_tokens
        token_s = (now_s - sent_s) / max(ahead, 1)
        self.token_s = token_s if self.token_s is None else self.token_s + PACE_WEIGHT * (token_s - self.token_s)


@dataclass
class Router:
    """Chooses an instance. It knows only what a router in front of real servers knows: what it sent and what came back.

    ``least_requests`` and ``least_tokens`` send a request where the fewest requests, or prompt tokens, are under way.
    ``cache_aware`` remembers which prefixes it sent where, as SGLang's router does: a prompt goes where most of it has been
    seen; one that is new, and any while load is uneven, goes where the fewest requests are. ``expected_ttft`` sends it where
    its first token should come back soonest: by the prompt tokens that wait there and those of its own that have not been
    seen, at the pace at which such tokens were answered. Instances with the same claim take turns.

    Instances that are ``closed`` get nothing new.
    """

    kind: str
    instances: int
    clock: Callable[[], float] = lambda: 0.0
    closed: set[int] = field(default_factory=set)
    _next: int = 0
    _requests: list[int] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _blocks: list[OrderedDict[int, None]] = field(default_factory=list)
    _paces: list[Pace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._requests = [0] * self.instances
        self._tokens = [0] * self.instances
        self._blocks = [OrderedDict() for _ in range(self.instances)]
        self._paces = [Pace() for _ in range(self.instances)]

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        """The instance for a prompt; counts it there until :meth:`ended`."""
        if self.instances == 1:
            return 0
        everybody = self._open
        if self.kind == "round_robin":
            chosen = self._in_turn(everybody)
        elif self.kind == "least_requests":
            chosen = self._least(everybody, self._requests)
        elif self.kind == "least_tokens":
            chosen = self._least(everybody, self._tokens)
        elif self.kind == "expected_ttft":
            chosen = self._soonest(prompt, namespace)
        else:
            chosen = self._by_cache(prompt, namespace)
        self._next = (chosen + 1) % self.instances
        self._requests[chosen] += 1
        self._tokens[chosen] += len(prompt)
        return chosen

    def ended(self, instance: int, prompt_tokens: int) -> None:
        """A request sent to ``instance`` has ended."""
        if self.instances == 1:
            return
        self._requests[instance] -= 1
        self._tokens[instance] -= prompt_tokens

    def add(self) -> int:
        """One more instance; returns its number. One alone is not counted for, so there have to be two before."""
        if self.instances < 2:
            raise ValueError(f"a router of {self.instances} instances does not grow")
        self._requests.append(0)
        self._tokens.append(0)
        self._blocks.append(OrderedDict())
        self._paces.append(Pace())
        self.instances += 1
        return self.instances - 1

    def replaced(self, instance: int) -> None:
        """Another one is there in the place of an instance that nothing is under way at: what it was sent is forgotten."""
        self._blocks[instance].clear()
        self._paces[instance] = Pace()

    @property
    def _open(self) -> Sequence[int]:
        everybody = range(self.instances)
        return [i for i in everybody if i not in self.closed] or everybody if self.closed else everybody

    def answered(self, instance: int, prompt_tokens: int) -> None:
        """The first token of a request has come back, or it has ended without one."""
        if self.kind == "expected_ttft" and self.instances > 1:
            self._paces[instance].answered(prompt_tokens, self.clock())

    def _soonest(self, prompt: np.ndarray, namespace: str) -> int:
        keys = _block_keys(prompt, namespace)
        new = [len(prompt) - BLOCK_TOKENS * self._seen(keys, i) for i in range(self.instances)]
        known = [pace.token_s for pace in self._paces if pace.token_s is not None]
        unknown_s = sum(known) / len(known) if known else 1.0  # as the others; of all, any will do
        expected_s = [
            (pace.waiting_tokens + tokens) * (unknown_s if pace.token_s is None else pace.token_s)
            for pace, tokens in zip(self._paces, new, strict=True)
        ]
        chosen = self._least(self._open, expected_s)
        self._paces[chosen].sent(len(prompt), new[chosen], self.clock())
        self._remember(chosen, keys)
        return chosen

    def _seen(self, keys: list[int], instance: int) -> int:
        """Count the blocks of a prompt, from its first, that have been sent to an instance."""
        seen = self._blocks[instance]
        return next((n for n, key in enumerate(keys) if key not in seen), len(keys))

    def _least(self, among: Iterable[int], load: Sequence[float]) -> int:
        candidates = list(among)
        least = min(load[i] for i in candidates)
        return self._in_turn(i for i in candidates if load[i] == least)

    def _in_turn(self, among: Iterable[int]) -> int:
        """The first of these after the instance that was chosen last."""
        return min(among, key=lambda i: (i - self._next) % self.instances)

    def _by_cache(self, prompt: np.ndarray, namespace: str) -> int:
        keys = _block_keys(prompt, namespace)
        among: Sequence[int] = self._open
        high, low = max(self._requests[i] for i in among), min(self._requests[i] for i in among)
        if not (high - low > BALANCE_ABS_THRESHOLD and high > BALANCE_REL_THRESHOLD * low):
            matched = [self._seen(keys, instance) for instance in range(self.instances)]
            best = max(matched[i] for i in among)
            if best * BLOCK_TOKENS > CACHE_THRESHOLD * len(prompt):
                among = [i for i in among if matched[i] == best]
        chosen = self._least(among, self._requests)
        self._remember(chosen, keys)
        return chosen

    def _remember(self, instance: int, keys: list[int]) -> None:
        seen = self._blocks[instance]
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > REMEMBERED_BLOCKS:
            seen.popitem(last=False)


def _block_keys(prompt: np.ndarray, namespace: str) -> list[int]:
    """A key for every whole block, chained so that it stands for the prefix up to there."""
    keys = []
    key = crc32(namespace.encode())
    for at in range(0, len(prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = prompt[at : at + BLOCK_TOKENS].tobytes()
        key = (crc32(block, key & 0xFFFFFFFF) << 32) | crc32(block, (key >> 32) ^ 0x9E3779B9)
        keys.append(key)
    return keys
