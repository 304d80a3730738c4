"""Which instance a request goes to."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

ROUTERS = ("round_robin", "least_requests", "least_tokens", "cache_aware")
BLOCK_TOKENS = 128
"""Granularity at which the router remembers prompts."""
REMEMBERED_BLOCKS = 200_000
"""Blocks remembered per instance, least recently used first out."""
IMBALANCE_REQUESTS = 32
"""Cache affinity gives way when the busiest instance has this many requests more than the idlest, and half as many again."""


@dataclass
class Router:
    """Chooses an instance. It knows only what a router in front of real servers knows: what it sent and what came back.

    ``cache_aware`` remembers which prefixes it sent where and prefers the longest, unless load is uneven.
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
        if self.kind == "round_robin":
            chosen = self._next
            self._next = (self._next + 1) % self.instances
        elif self.kind == "least_requests":
            chosen = self._least(self._requests)
        elif self.kind == "least_tokens":
            chosen = self._least(self._tokens)
        else:
            chosen = self._by_cache(prompt, namespace)
        self._requests[chosen] += 1
        self._tokens[chosen] += len(prompt)
        return chosen

    def ended(self, instance: int, prompt_tokens: int) -> None:
        """A request sent to ``instance`` has ended."""
        self._requests[instance] -= 1
        self._tokens[instance] -= prompt_tokens

    def _least(self, load: list[int]) -> int:
        return min(range(self.instances), key=lambda i: load[i])

    def _by_cache(self, prompt: np.ndarray, namespace: str) -> int:
        keys = _block_keys(prompt, namespace)
        high, low = max(self._requests), min(self._requests)
        if high - low > IMBALANCE_REQUESTS and high > 1.5 * low:
            chosen = self._least(self._requests)
        else:
            matched = [next((n for n, key in enumerate(keys) if key not in seen), len(keys)) for seen in self._blocks]
            best = max(matched)
            chosen = min((i for i in range(self.instances) if matched[i] == best), key=lambda i: self._requests[i])
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
