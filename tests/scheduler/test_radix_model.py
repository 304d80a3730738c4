"""The radix tree against a model that is too simple to be wrong: a dictionary of page-aligned prefixes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.scheduler.kv.radix import EVICTION, RadixTree
from workbench.scheduler.prefix_node import Node

TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=14)
NAMESPACES = st.sampled_from(["", "adapter"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), NAMESPACES, TOKENS),
        st.tuples(st.just("match"), NAMESPACES, TOKENS),
        st.tuples(st.just("measure"), NAMESPACES, TOKENS),
        st.tuples(st.just("lock"), NAMESPACES, TOKENS),
        st.tuples(st.just("unlock"), st.integers(0, 100)),
        st.tuples(st.just("evict"), st.integers(1, 6)),
    ),
    max_size=40,
)
Prefix = tuple[str, tuple[int, ...]]


def array(tokens) -> np.ndarray:
    return np.array(tokens, np.int32)


class Model:
    """Which page holds each known prefix, and how often each is locked."""

    def __init__(self, page_size: int) -> None:
        self.size = page_size
        self.pages: dict[Prefix, int] = {}
        self.locks: dict[Prefix, int] = {}

    def prefixes(self, namespace: str, tokens) -> list[Prefix]:
        """The whole-page prefixes of a sequence, shortest first."""
        size = self.size
        return [(namespace, tuple(tokens[: n * size])) for n in range(1, len(tokens) // size + 1)]

    def match(self, namespace: str, tokens) -> list[Prefix]:
        known = []
        for prefix in self.prefixes(namespace, tokens):
            if prefix not in self.pages:
                break
            known.append(prefix)
        return known

    @property
    def protected(self) -> set[Prefix]:
        return {prefix for prefix, count in self.locks.items() if count}


class Pair:
    """The tree and the model, moved together and compared after every move."""

    def __init__(self, page_size: int, evict: str) -> None:
        self.tree = RadixTree(page_size, evict)
        self.model = Model(page_size)
        self.size = page_size
        self.next_page = 0
        self.held: list[tuple[Node | None, list[Prefix]]] = []

    def insert(self, namespace: str, tokens: list[int]) -> None:
        tokens = tokens[: len(tokens) // self.size * self.size]
        pages = np.arange(self.next_page, self.next_page + len(tokens) // self.size, dtype=np.int32)
        self.next_page += len(pages)
        known = self.model.match(namespace, tokens)
        node, had = self.tree.insert(array(tokens), pages, namespace)
        assert had == len(known)
        for prefix, page in list(zip(self.model.prefixes(namespace, tokens), pages.tolist(), strict=True))[had:]:
            self.model.pages[prefix] = page
        expected = [self.model.pages[prefix] for prefix in self.model.prefixes(namespace, tokens)]
        assert self.tree.path_pages(node).tolist() == expected

    def match(self, namespace: str, tokens: list[int]) -> tuple[Node | None, list[Prefix]]:
        known = self.model.match(namespace, tokens)
        node, length = self.tree.match(array(tokens), namespace)
        assert length == len(known) * self.size
        assert self.tree.path_pages(node).tolist() == [self.model.pages[prefix] for prefix in known]
        return node, known

    def measure(self, namespace: str, tokens: list[int]) -> None:
        before = self.shape()
        _, length = self.tree.match(array(tokens), namespace, touch=False)
        assert length == len(self.model.match(namespace, tokens)) * self.size
        assert self.shape() == before

    def lock(self, namespace: str, tokens: list[int]) -> None:
        node, known = self.match(namespace, tokens)
        self.tree.lock(node)
        self.held.append((node, known))
        for prefix in known:
            self.model.locks[prefix] = self.model.locks.get(prefix, 0) + 1

    def unlock(self, which: int) -> None:
        if not self.held:
            return
        node, known = self.held.pop(which % len(self.held))
        self.tree.unlock(node)
        for prefix in known:
            self.model.locks[prefix] -= 1

    def evict(self, count: int) -> None:
        before = self.tree.evictable_pages
        gone = [int(page) for pages in self.tree.evict(count) for page in pages]
        assert len(set(gone)) == len(gone)
        assert len(gone) >= min(count, before), "less was evicted than asked for, though there was more"
        by_page = {page: prefix for prefix, page in self.model.pages.items()}
        for page in gone:
            prefix = by_page[page]
            assert prefix not in self.model.protected, "a locked page was evicted"
            del self.model.pages[prefix]

    def shape(self) -> list[tuple]:
        """Everything that a measurement must leave alone."""
        return [(id(n), tuple(n.key), n.locks, n.hits, n.last_access, len(n.children)) for n in self.tree.nodes()]

    def compare(self) -> None:
        tree, model = self.tree, self.model
        held = sorted(int(page) for node in tree.nodes() for page in node.pages)
        assert held == sorted(model.pages.values())
        assert tree.protected_pages == len(model.protected)
        assert tree.evictable_pages == len(model.pages) - len(model.protected)
        for node in tree.nodes():
            assert len(node.key) == len(node.pages) * self.size > 0
            # A lock on a node is a lock on all above it, and both halves of a split keep it.
            assert node.parent is not None
            assert node.parent.parent is None or node.parent.locks >= node.locks
        # Without its first pages a prefix is of no use: nothing is left hanging.
        for namespace, tokens in model.pages:
            assert all(prefix in model.pages for prefix in model.prefixes(namespace, tokens))


@pytest.mark.parametrize("evict", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_the_tree_agrees_with_a_dictionary_of_prefixes(page_size, evict):
    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    @given(OPERATIONS)
    def check(operations: list[tuple]) -> None:
        pair = Pair(page_size, evict)
        for name, *arguments in operations:
            getattr(pair, name)(*arguments)
            pair.compare()
        while pair.held:
            pair.unlock(0)
        pair.compare()
        assert pair.tree.protected_pages == 0
        # All of it can go once nothing is locked, and then nothing is left.
        pair.evict(len(pair.model.pages) + 1)
        pair.compare()
        assert not pair.model.pages

    check()


def test_a_split_inherits_the_locks_and_the_past():
    tree = RadixTree(1)
    node, _ = tree.insert(array([1, 2, 3, 4]), array([0, 1, 2, 3]))
    tree.lock(node)
    tree.match(array([1, 2, 3, 4]))
    hits, created = node.hits, node.created
    upper, length = tree.match(array([1, 2, 9]))
    assert length == 2 and upper is not None
    assert upper is node.parent and upper.locks == node.locks == 1
    assert upper.created == created and upper.hits == hits + 1
    assert tree.evict(4) == []
    assert (tree.protected_pages, tree.evictable_pages) == (4, 0)
    tree.unlock(node)
    assert (tree.protected_pages, tree.evictable_pages) == (0, 4)
    assert upper.locks == 0


def test_a_match_ends_at_a_whole_page_and_leaves_the_tail_alone():
    tree = RadixTree(4)
    tree.insert(array(range(8)), array([0, 1]))
    assert tree.match(array(range(7)))[1] == 4
    assert tree.match(array(range(3)))[1] == 0
    assert tree.match(array([0, 1, 2, 3, 4, 5, 6, 99]))[1] == 4


def test_evictable_counts_inner_nodes_though_only_leaves_can_go_first():
    tree = RadixTree(1)
    tree.insert(array([1, 2]), array([0, 1]))
    tree.insert(array([1, 2, 3]), array([0, 1, 2]))
    assert tree.evictable_pages == 3
    assert [pages.tolist() for pages in tree.evict(1)] == [[2]]
    assert [pages.tolist() for pages in tree.evict(2)] == [[0, 1]]


def evicted_first(evict: str) -> int:
    """Four leaves, one the oldest, one the least recently and one the least often used: which goes first?"""
    tree = RadixTree(1, evict)
    for token in (10, 20, 30):
        tree.insert(array([token]), array([token]))
    for token in (20, 20, 30, 10):  # 20 twice but longest ago
        tree.match(array([token]))
    if evict == "lfu":
        assert {n.pages[0]: n.hits for n in tree.nodes()} == {10: 1, 20: 2, 30: 1}
    return int(tree.evict(1)[0][0])


def test_lru_lfu_and_fifo_evict_different_leaves():
    assert {evict: evicted_first(evict) for evict in ("lru", "lfu", "fifo")} == {"lru": 20, "lfu": 30, "fifo": 10}


class Counted:
    """Counts how often a priority is asked for or compared."""

    def __init__(self) -> None:
        self.asked = self.compared = 0

    def priority(self, node: Node) -> CountedKey:
        self.asked += 1
        return CountedKey((node.last_access,), self)


class CountedKey(tuple):
    count: Counted

    def __new__(cls, values, count: Counted):
        key = super().__new__(cls, values)
        key.count = count
        return key

    def __lt__(self, other):
        self.count.compared += 1
        return tuple.__lt__(self, other)


LEAVES = 100_000


def test_evicting_from_a_hundred_thousand_leaves_is_work_for_a_heap_and_not_for_a_sort(monkeypatch):
    count = Counted()
    monkeypatch.setitem(EVICTION, "lru", count.priority)
    tree = RadixTree(1)
    for token in range(LEAVES):
        tree.insert(array([token]), array([token]))
    count.asked = count.compared = 0
    gone = tree.evict(100)
    assert [int(pages[0]) for pages in gone] == list(range(100))
    # A pop from a heap compares at most twice a level; looking at every leaf once would be 100,000.
    assert count.asked <= 2 * 100
    assert count.compared <= 100 * 3 * math.ceil(math.log2(LEAVES))


def test_hits_cost_the_eviction_heap_nothing_until_their_leaf_comes_up(monkeypatch):
    count = Counted()
    monkeypatch.setitem(EVICTION, "lru", count.priority)
    tree = RadixTree(1)
    for token in range(1000):
        tree.insert(array([token]), array([token]))
    count.asked = count.compared = 0
    for _ in range(20):
        for token in range(10):  # the ten oldest, again and again
            tree.match(array([token]))
    assert count.asked == count.compared == 0
    assert len(tree._heap) == 1000
    assert int(tree.evict(1)[0][0]) == 10
    # Each stale entry is put right once.
    assert count.asked <= 2 * 10 + 1 and len(tree._heap) == 999


def test_locking_and_unlocking_again_and_again_does_not_grow_the_heap():
    tree = RadixTree(1)
    node, _ = tree.insert(array([1, 2]), array([0, 1]))
    for _ in range(1000):
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._heap) == 1
