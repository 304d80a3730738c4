"""Routers: the choice of the instance that a request goes to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, get_args
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
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
"""Load is uneven when the busiest instance has so many requests more than the idlest and so many times as many: then
cache affinity gives way. These three are the defaults of SGLang's router."""


class Routes(Protocol):
    """A chooser of an instance for each request. One's own is made with the number of instances."""

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        """The instance, from 0 on, for a prompt (int32[n], its tokens); requests of different namespaces share no KV."""
        ...

    def ended(self, instance: int, prompt_tokens: int) -> None:
        """Note that a request which was sent to ``instance`` has ended; its prompt had so many tokens."""
        ...


def make_router(kind: str, instances: int) -> Routes:
    """The router of that kind, or the class ``module:Class``, for so many instances. Raises ConfigError."""
    if not is_own(kind):
        return Router(kind, instances)
    methods = {"choose": ("prompt", "namespace"), "ended": ("instance", "prompt_tokens")}
    return _Checked(kind, make_own("router", kind, methods, instances=instances), instances)


class _Checked:
    """A router of one's own. Raises ConfigError when it chooses an instance that there is not."""

    def __init__(self, spec: str, router: Routes, instances: int) -> None:
        self._spec, self._router, self._instances = spec, router, instances
        self.ended = router.ended

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        chosen = self._router.choose(prompt, namespace)
        if chosen not in range(self._instances):
            raise ConfigError(
                f"router: {self._spec}.choose returned {chosen!r}, which is none of the instances 0 to {self._instances - 1}"
            )
        return int(chosen)


@dataclass
class Router:
    """Chooses an instance. It knows only what a router in front of real servers knows: what it sent and what came back.

    ``least_requests`` and ``least_tokens`` send a request where the fewest requests, or prompt tokens, are under way.
    ``cache_aware`` remembers which prefixes it sent where, as SGLang's router does: a prompt goes where most of it has been
    seen; one that is new, and any while load is uneven, goes where the fewest requests are. Instances with the same claim
    take turns.
    """

    kind: str
    instances: int
    _next: int = 0
    _requests: list[int] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    _blocks: list[OrderedDict[int, None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._requests = [0] * self.instances
        self._tokens = [0] * self.instances
        self._blocks = [OrderedDict() for _ in range(self.instances)]

    def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
        """The instance for a prompt; counts it there until :meth:`ended`."""
        if self.instances == 1:
            return 0
        everybody = range(self.instances)
        if self.kind == "round_robin":
            chosen = self._in_turn(everybody)
        elif self.kind == "least_requests":
            chosen = self._least(everybody, self._requests)
        elif self.kind == "least_tokens":
            chosen = self._least(everybody, self._tokens)
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

    def _least(self, among: Iterable[int], load: list[int]) -> int:
        candidates = list(among)
        least = min(load[i] for i in candidates)
        return self._in_turn(i for i in candidates if load[i] == least)

    def _in_turn(self, among: Iterable[int]) -> int:
        """The first of these after the instance that was chosen last."""
        return min(among, key=lambda i: (i - self._next) % self.instances)

    def _by_cache(self, prompt: np.ndarray, namespace: str) -> int:
        keys = _block_keys(prompt, namespace)
        among: Iterable[int] = range(self.instances)
        high, low = max(self._requests), min(self._requests)
        if not (high - low > BALANCE_ABS_THRESHOLD and high > BALANCE_REL_THRESHOLD * low):
            matched = [next((n for n, key in enumerate(keys) if key not in seen), len(keys)) for seen in self._blocks]
            best = max(matched)
            if best * BLOCK_TOKENS > CACHE_THRESHOLD * len(prompt):
                among = [i for i in among if matched[i] == best]
        chosen = self._least(among, self._requests)
        seen = self._blocks[chosen]
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > REMEMBERED_BLOCKS:
            seen.popitem(last=False)
        return chosen


def _block_keys(prompt: np.ndarray, namespace: str) -> list[int]:
    """A key for every whole block, chained so that it stands for the prefix up to there."""
    keys = []
    key = crc32(namespace.encode())
    for at in range(0, len(prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = prompt[at : at + BLOCK_TOKENS].tobytes()
        key = (crc32(block, key & 0xFFFFFFFF) << 32) | crc32(block, (key >> 32) ^ 0x9E3779B9)
        keys.append(key)
    return keys
