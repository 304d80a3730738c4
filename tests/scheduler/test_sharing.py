"""Traps of the prefix cache: what is shared, and what is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.by_hand import (
    both_batchings,
    extends,
    finish_all,
    generate,
    rids,
    scheduler,
    step,
    words,
)
from workbench.scheduler.messages import FlushCache


@both_batchings
def test_a_prefix_about_to_be_computed_is_waited_for_by_one_batch_and_computed_once(batching):
    s = scheduler(batching=batching)
    s.receive([generate("a", words(0, 60), 3), generate("b", words(0, 60), 3), generate("c", words(200, 20), 3)])
    first, second = step(s), step(s)
    assert [req.rid for req in first.reqs[: first.worker.num_prefill]] == ["a", "c"]
    assert [req.rid for req in second.reqs[: second.worker.num_prefill]] == ["b"]
    assert (extends(first), extends(second)) == ([60, 20], [1])


@pytest.mark.parametrize(("threshold", "together"), [(None, True), (60, True), (59, False), (32, False)])
def test_sharing_in_a_batch_needs_as_much_in_common_as_the_threshold(threshold, together):
    s = scheduler(share_in_batch_tokens=threshold)
    s.receive([generate("a", [*words(0, 59), 500], 1), generate("b", [*words(0, 59), 501], 1)])
    assert (len(step(s).reqs) == 2) == together


def test_namespaces_share_nothing():
    s = scheduler()
    for rid, namespace, cached in (("a", "", 0), ("b", "lora", 0), ("c", "lora", 39), ("d", "", 39)):
        s.receive([generate(rid, words(0, 40), 1, namespace=namespace)])
        assert step(s).reqs[0].cached_tokens == cached
    s.receive([generate("e", words(0, 60), 1), generate("f", words(0, 60), 1, namespace="salt")])
    assert rids(step(s)) == ["e", "f"]  # nor do they wait for each other


def test_a_cache_that_is_off_never_matches_and_keeps_nothing():
    s = scheduler(cache="none")
    for rid in "abc":
        s.receive([generate(rid, words(0, 40), 2)])
        batch = step(s)
        assert extends(batch) == [40] and batch.reqs[0].cached_tokens == 0
        finish_all(s)
        assert s.kv.pool.free == s.kv.pool.total


@pytest.mark.parametrize(("evict", "gone"), [("lru", "b"), ("lfu", "c"), ("fifo", "a")])
def test_each_way_to_evict_forgets_another_prompt(evict, gone):
    s = scheduler(kv_tokens=100, evict=evict)
    prompts = {"a": words(0, 30), "b": words(100, 30), "c": words(200, 30)}
    # a is the oldest, b the least recently used, c the least often used.
    for i, name in enumerate(["a", "b", "c", "b", "b", "b", "c", "a", "a", "a"]):
        s.receive([generate(f"{i}", prompts[name], 1)])
        step(s)
    s.receive([generate("new", words(300, 20), 1)])
    step(s)
    kept = {n: s.kv.cache.tree.match(np.array(p, np.int32), touch=False)[1] == 30 for n, p in prompts.items()}
    assert [name for name, whole in kept.items() if not whole] == [gone]


def test_a_flush_forgets_what_nobody_uses_and_spares_what_is_in_use():
    s = scheduler()
    s.receive([generate("a", words(0, 40), 1), generate("b", words(100, 40), 5)])
    step(s)
    step(s)
    s.receive([FlushCache()])
    s.check()
    assert s.kv.cache.counts.evictable_pages == 0 and s.kv.cache.counts.protected_pages == 40
    s.receive([generate("c", words(0, 40), 1)])
    assert step(s).reqs[0].cached_tokens == 0
    finish_all(s)
