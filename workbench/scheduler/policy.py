"""Orders of the waiting queue.

A policy sees the queue in order of arrival and returns it in the order of service. One of your own subclasses
:class:`Policy`, and ``--policy mypackage:MyPolicy`` runs it in simulation and live alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.scheduler.config import ConfigError
from workbench.scheduler.kv.prefix_cache import PrefixCache
from workbench.scheduler.kv.radix import RadixTree
from workbench.scheduler.own_code import load_own, make_own
from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req
from workbench.scheduler.settings import is_own

PREFIX_LIMIT = 128
"""Above this many waiting requests, policies that look up prefixes do without: each look-up walks the tree."""


@dataclass(frozen=True)
class PolicyView:
    """View of the scheduler that a policy has beside the requests."""

    cache: PrefixCache
    now_s: float
    rng: random.Random
    """Seeded by the scheduler: a policy that draws from it is reproducible."""
    touches: bool = False
    """To look a prompt up counts as a use of what there is of it."""
    defer_shared_tokens: int | None = None
    """Who shares as much with one before it, and has no more of it in the cache, goes last."""

    def cached_tokens(self, req: Req) -> int:
        """Tokens of a request that the prefix cache has: of all of them where ``touches``, else of all but the last."""
        return self.cache.touch(req) if self.touches else self.cache.measure(req).device

    def deferred(self, waiting: Sequence[Req], cached: Sequence[int]) -> set[int]:
        """Ids of the request objects that go last, given how much of each is ``cached``."""
        most, found = self.defer_shared_tokens, set[int]()
        if most is None:
            return found
        earlier = RadixTree(1)
        for req, tokens in zip(waiting, cached, strict=True):
            if tokens > most:
                continue
            if earlier.match(req.tokens, req.namespace, touch=False)[1] >= most:
                found.add(id(req))
            else:
                earlier.insert(req.tokens, np.zeros(len(req.tokens), np.int32), req.namespace)
        return found


class Policy:
    """Base class and first-come-first-served. One's own is made once a scheduler, without arguments."""

    by_prefix = False
    """Whether the order depends on what the prefix cache has of the requests."""

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        """Put the queue in the order of service: return ``waiting``, which is in order of arrival, as it is or as another
        list of the same requests. Times of requests and view are seconds on the same clock, lengths are tokens.

        It is asked whenever requests may be admitted. An answer that loses or repeats a request is a ConfigError.
        """
        return waiting


class LongestPrefixMatch(Policy):
    """Longest cached prefix first; fcfs above ``PREFIX_LIMIT`` waiting requests."""

    by_prefix = True

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        if len(waiting) > PREFIX_LIMIT or not view.cache.enabled:
            return waiting
        cached = [view.cached_tokens(req) for req in waiting]
        last = view.deferred(waiting, cached)
        places = [
            1 if id(req) in last else -min(tokens, len(req.tokens) - 1)
            for req, tokens in zip(waiting, cached, strict=True)
        ]
        return [waiting[at] for at in sorted(range(len(waiting)), key=places.__getitem__)]


class DepthFirstWeight(Policy):
    """Depth first over the prefix tree, the subtree with the most waiting requests first; fcfs above ``PREFIX_LIMIT``."""

    by_prefix = True

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        if len(waiting) > PREFIX_LIMIT or not view.cache.enabled:
            return waiting
        at: dict[Node | None, list[Req]] = {}
        weight: dict[Node | None, int] = {}
        below: dict[Node | None, list[Node]] = {}
        for req in waiting:
            node = view.cache.measure(req).node
            at.setdefault(node, []).append(req)
            while node is not None:
                if node not in weight and node.parent is not None:
                    below.setdefault(node.parent, []).append(node)
                weight[node] = weight.get(node, 0) + 1
                node = node.parent
        ordered: list[Req] = []
        # Roots, one a namespace, by weight; a request whose namespace has no root yet shares nothing and goes last.
        stack: list[Node | None] = [None]
        stack += sorted((n for n in weight if n is not None and n.parent is None), key=lambda n: weight[n])
        while stack:
            node = stack.pop()
            # A node's own requests go after its subtrees: what is cached deepest is used before it can be evicted.
            if node is not None and (children := below.pop(node, None)):
                stack.append(node)
                stack += sorted(children, key=lambda n: weight[n])
                continue
            ordered += at.pop(node, [])
        return ordered


class LongestOutputFirst(Policy):
    """Largest output bound first."""

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        return sorted(waiting, key=lambda req: -req.max_new)


class ShortestPromptFirst(Policy):
    """Fewest tokens to compute first: the uncached prompt, or all of it above ``PREFIX_LIMIT`` waiting requests."""

    by_prefix = True

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        if len(waiting) > PREFIX_LIMIT or not view.cache.enabled:
            return sorted(waiting, key=lambda req: len(req.tokens))
        return sorted(waiting, key=lambda req: len(req.tokens) - view.cache.measure(req).device)


class EarliestDeadlineFirst(Policy):
    """Earliest deadline of the first token first; requests already late go last, since nothing saves them."""

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        return sorted(waiting, key=lambda req: (req.deadline_s < view.now_s, req.deadline_s))


class Random(Policy):
    """A new random order at every look."""

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        shuffled = list(waiting)
        view.rng.shuffle(shuffled)
        return shuffled


class PriorityFirst(Policy):
    """Highest priority first, then arrival."""

    def order(self, waiting: list[Req], view: PolicyView) -> list[Req]:
        return sorted(waiting, key=lambda req: -req.priority)


POLICIES: dict[str, type[Policy]] = {
    "fcfs": Policy,
    "lpm": LongestPrefixMatch,
    "dfs-weight": DepthFirstWeight,
    "lof": LongestOutputFirst,
    "sjf": ShortestPromptFirst,
    "edf": EarliestDeadlineFirst,
    "random": Random,
    "priority": PriorityFirst,
}


def load_policy(name: str) -> Policy:
    """A policy by name, or by ``module:Class``. Raises :class:`ConfigError` when there is none or it is no policy."""
    if name in POLICIES:
        return POLICIES[name]()
    if not is_own(name):
        raise ConfigError(f"policy: {name!r} is not one of {', '.join(POLICIES)}, nor module:Class")
    cls = load_own("policy", name)
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ConfigError(f"policy: {name!r} is not a subclass of workbench.scheduler.policy.Policy")
    made: Policy = make_own("policy", name, {"order": ("waiting", "view")})
    return made


def check_permutation(ordered: Sequence[Req], waiting: Sequence[Req], policy: Policy) -> None:
    """A policy that loses or repeats a request would lose it for good: refuse the order instead."""
    same = isinstance(ordered, Sequence) and len(ordered) == len(waiting)
    if not same or {id(req) for req in ordered} != {id(req) for req in waiting}:
        raise ConfigError(f"policy: {type(policy).__name__}.order did not return a permutation of the waiting queue")
