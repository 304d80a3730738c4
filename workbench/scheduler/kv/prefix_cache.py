"""The interface of prefix caches to the scheduler, whatever is behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from workbench.scheduler.prefix_node import Node
from workbench.scheduler.request import Req


class Match(NamedTuple):
    """The part of a request's prompt whose KV is somewhere, in whole pages from its start. Counts are tokens.

    A named tuple, because the whole queue may be measured on every step.
    """

    node: Node | None
    """Deepest node of the match, which is what to lock; None where nothing matched."""
    device: int
    """In pages of the pool: need not be computed."""
    elsewhere: int = 0
    """After those, in a slower tier: could be loaded instead of computed. 0 while there is no such tier."""
    pending: int = 0
    """After those, on their way into pages of the pool. 0 while there is no such tier."""


class PageCounts(Protocol):
    """The pages of a prefix cache."""

    evictable_pages: int
    """Those that nobody has locked: :meth:`PrefixCache.evict` could free them."""

    @property
    def protected_pages(self) -> int:
        """Those that some request has locked."""
        ...


class PrefixCache(Protocol):
    """Store of the KV of prompts and outputs beyond the requests that computed it.

    A request's row starts with ``shared_pages`` pages that the cache owns and the request has locked through its ``node``;
    the pages after them are the request's own until they are inserted, freed as duplicates, or released.
    """

    enabled: bool
    """Whether anything can ever match."""
    names_at_once: bool
    """Whether pages are to be shared with the step that fills them (:meth:`fill`), not with :meth:`insert`."""

    @property
    def counts(self) -> PageCounts:
        """How many pages it has, kept up to date: they are looked at on every step."""
        ...

    def measure(self, req: Req) -> Match:
        """Return what :meth:`match` would find, without touching recency or shape: for ordering the queue."""
        ...

    def match(self, req: Req) -> Match:
        """Longest cached prefix of a request, at most all but its last token: one must be computed to sample from."""
        ...

    def touch(self, req: Req) -> int:
        """Let what there is of a request's tokens, all of them, count as used; returns how many those are."""
        ...

    def path_pages(self, node: Node | None) -> np.ndarray:
        """int32: the pages from the start of a prefix to the end of ``node``."""
        ...

    def loose_pages(self, node: Node | None) -> int:
        """Return how many pages of a prefix nobody has locked: those that :meth:`lock` takes from what could be evicted."""
        ...

    def lock(self, node: Node | None) -> None:
        """Keep a prefix from being evicted until :meth:`unlock`."""
        ...

    def unlock(self, node: Node | None) -> None:
        """Undo one :meth:`lock`."""
        ...

    def insert(self, req: Req, tokens: np.ndarray | None = None) -> None:
        """Share what a request has computed so far (``kv_len``), or int32 ``tokens`` of it, while it goes on.

        Pages that the cache already had are duplicates now: they are freed and the row is pointed at the cache's. A batch in
        flight may still read them; whoever is given them next writes in a later batch of the same stream.
        """
        ...

    def release(self, req: Req, valid_tokens: int, held_tokens: int, *, insert: bool) -> None:
        """End a request's hold on its pages. Its row is the caller's to give back.

        ``valid_tokens`` have KV worth keeping, which is done where ``insert`` says so. Pages cover ``held_tokens``, more
        when a batch ran after the stop.
        """
        ...

    def give_unused(self, pages: np.ndarray) -> None:
        """Take back pages, just allocated, into which nothing will be written after all."""
        ...

    def started(self, req: Req) -> None:
        """Note that a request has its row and what :meth:`match` found for it."""
        ...

    def fill(self, req: Req, tokens: int) -> None:
        """Share the pages that so many tokens of a request fill, all of them computed by steps that are formed."""
        ...

    def fill_decodes(self, reqs: list[Req], rows: np.ndarray, tokens: np.ndarray) -> None:
        """:meth:`fill` for several requests that decode: int64[n] rows, int64[n] tokens."""
        ...

    def unfill(self, req: Req, tokens: int) -> None:
        """Undo :meth:`fill` beyond so many tokens of a request: the step that was to compute them is not run."""
        ...

    def evict(self, count: int) -> None:
        """Free at least ``count`` pages into the pool, or all that nobody has locked."""
        ...

    def nodes(self) -> Iterator[Node]:
        """Every node that owns pages, for checks."""
        ...

    def check(self, holders: Iterable[tuple[Req, int]]) -> list[np.ndarray]:
        """Assert that its own accounts are right, given the requests that have a row and how many tokens their pages cover.
        Returns the pages that are not free, each as often as it has an owner."""
        ...
