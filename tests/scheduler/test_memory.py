"""Traps of memory: what fits, who is retracted, who is preempted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.by_hand import (
    both_batchings,
    every_loop,
    finish_all,
    generate,
    rids,
    scheduler,
    step,
    words,
)
from tests.world import Job, simulate
from workbench.scheduler.scheduler import Scheduler

# -- memory ------------------------------------------------------------------------------------------------------------


@every_loop
@both_batchings
@pytest.mark.parametrize("page_size", [1, 4])
def test_an_oversized_request_alone_fails_with_a_reason_and_the_next_one_runs(loop, batching, page_size):
    jobs = [Job("a", words(0, 20), 60, eos=False), Job("b", words(100, 10), 5, eos=False, arrival_s=5.0)]
    run = simulate(jobs, loop, kv_tokens=32, batching=batching, page_size=page_size)
    assert run.ended["a"].finish.status == "aborted:kv_exhausted"
    # 12 tokens find room beside the prompt, and the last sample needs none.
    assert run.ended["a"].output_len == len(run.outputs["a"]) == 13
    assert run.ended["b"].finish.status == "finished"


@pytest.mark.parametrize(
    ("prompt", "new", "max_context", "reason"),
    [
        (words(0, 59), 5, 60, "prompt_exceeds_context"),
        (words(0, 75), 1, 60, "prompt_exceeds_context"),
        (words(0, 81), 5, 100, "prompt_exceeds_kv"),
        (words(0, 80), 2, 100, "prompt_exceeds_kv"),
        ([], 5, 100, "empty_prompt"),
        (words(0, 5), -1, 100, "output_bound_below_zero"),
        (words(0, 60), 0, 60, "prompt_exceeds_context"),
        (words(0, 81), 0, 100, "prompt_exceeds_kv"),
    ],
)
def test_what_can_never_run_is_refused_at_once_with_a_reason(prompt, new, max_context, reason):
    s = scheduler(kv_tokens=80, max_context=max_context)
    s.receive([generate("a", prompt, new)])
    (ended,) = s.take_ended()
    assert ended.finish.status == f"rejected:{reason}"
    assert not s.queue.waiting and s.idle


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 5), st.integers(0, 5))
def test_the_longest_prompt_is_the_last_that_is_not_rejected(kv_tokens, max_context, page_size, new):
    if kv_tokens < page_size:
        return
    s = scheduler(kv_tokens=kv_tokens, max_context=max_context, page_size=page_size)
    longest = s.capacity.longest_prompt(new)
    for tokens in range(1, max(kv_tokens, max_context) + 2):
        s.receive([generate(f"r{tokens}", words(0, tokens), new)])
        assert bool(s.take_ended()) == (tokens > longest), tokens


def test_the_largest_prompts_that_can_run_do():
    for prompt, new in ((words(0, 80), 1), (words(0, 79), 2)):
        s = scheduler(kv_tokens=80, max_context=100)
        s.receive([generate("a", prompt, new)])
        assert finish_all(s)[-1].reqs[0].finish.status == "finished"


def test_a_prompt_that_fills_the_pool_runs_if_the_context_leaves_it_one_token():
    s = scheduler(kv_tokens=80, max_context=82)
    s.receive([generate("a", words(0, 80), 5)])  # cut to 1: its 80 tokens fill the pool, its output needs no room
    assert s.take_ended() == []
    assert finish_all(s)[-1].reqs[0].finish.status == "finished"


def test_the_output_bound_is_cut_to_what_the_context_leaves():
    s = scheduler(max_context=50)
    s.receive([generate("a", words(0, 40), 4096)])
    assert s.queue.waiting[0].max_new == 50 - 40 - 1


def test_a_duplicate_id_is_refused_and_the_first_one_goes_on():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 2), generate("a", words(50, 10), 2)])
    (refused,) = s.take_ended()
    assert refused.finish.status == "rejected:duplicate_id"
    assert [rids(batch) for batch in finish_all(s)] == [["a"], ["a"]]
    s.receive([generate("a", words(0, 10), 1)])
    assert s.take_ended() == []  # the id is free again
    assert rids(step(s)) == ["a"]


def test_locking_a_prefix_takes_it_from_what_could_be_evicted_so_the_room_is_checked_again():
    s = scheduler(kv_tokens=100)
    s.receive([generate("a", words(0, 60), 1)])
    step(s)  # 60 tokens stay in the cache
    s.receive([generate("r", words(200, 20), 5)])
    step(s)
    # 20 free, 60 evictable, 3 expected of r: 18 more would fit if it were not the 60 that they build on.
    s.receive([generate("b", words(0, 75), 3)])
    assert rids(step(s)) == ["r"]
    assert s.kv.cache.counts.evictable_pages == 60
    assert all(req.finish is None for req in s.queue.waiting)


def test_the_one_that_has_written_least_is_retracted_and_of_equals_the_longest_prompt():
    s = scheduler(kv_tokens=240, conservativeness=0.001, cache="none")
    s.receive([generate("a", words(0, 10), 100)])
    step(s)
    s.receive([generate("b", words(100, 12), 100), generate("c", words(200, 10), 100)])
    step(s)
    for _ in range(69):  # 32 + 3 * 69 = 239 of 240
        assert not step(s).retracted
    batch = step(s)
    assert [req.rid for req in batch.retracted] == ["b"]
    # The two that are left have written 70 each, and are expected to need 20 more each, of 200 in all.
    assert s.estimate.new_token_ratio == pytest.approx((140 + 40) / 201)
    assert s.queue.waiting[0].rid == "b" and s.queue.waiting[0].output_len == 70
    assert len(s.queue.waiting[0].tokens) == 12 + 70


def test_the_expectation_decays_with_every_decode_and_is_reset_when_idle():
    s = scheduler(max_context=2000, kv_tokens=2000)
    assert s.estimate.new_token_ratio == pytest.approx(0.7)
    s.receive([generate("a", words(0, 10), 700)])
    step(s)
    assert s.estimate.new_token_ratio == pytest.approx(0.7)  # a prefill is no decode
    for _ in range(100):
        step(s)
    assert s.estimate.new_token_ratio == pytest.approx(0.7 - 100 * (0.7 - 0.7 * 0.14) / 600)
    for _ in range(550):
        step(s)
    assert s.estimate.new_token_ratio == pytest.approx(0.7 * 0.14)
    finish_all(s)
    assert s.estimate.new_token_ratio == pytest.approx(0.7)


def test_the_expectation_starts_at_one_at_most():
    assert scheduler(conservativeness=3.0).estimate.new_token_ratio == 1.0


def test_the_tail_that_fills_no_page_is_freed_and_the_rest_is_cached():
    s = scheduler(page_size=16, kv_tokens=160)
    s.receive([generate("a", words(0, 40), 1)])
    step(s)
    assert s.kv.cache.counts.evictable_pages == 2 and s.kv.pool.free == 8


# -- preemption by priority --------------------------------------------------------------------------------------------


def preempting(cache: str = "none", **settings: object) -> Scheduler:
    return scheduler(**{"policy": "priority", "preempt_threshold": 2, "cache": cache, "kv_tokens": 104, **settings})


def low_and_high(s: Scheduler) -> None:
    """20 tokens of priority 0 and 60 of priority 5, just prefilled; about 11 of 104 are not spoken for."""
    s.receive([generate("low", words(0, 20), 10), generate("high", words(100, 60), 10, priority=5)])
    assert rids(step(s)) == ["high", "low"]


def test_nobody_is_preempted_for_one_that_would_still_not_fit():
    s = preempting()
    low_and_high(s)
    s.receive([generate("c", words(300, 40), 10, priority=4)])
    batch = step(s)
    assert batch.worker.mode == "decode" and not batch.retracted


@pytest.mark.parametrize("cache", ["none", "radix"])
def test_the_lower_one_is_preempted_if_that_suffices_and_finishes_later(cache):
    s = preempting(cache)
    low_and_high(s)
    s.receive([generate("c", words(300, 20), 5, priority=4)])
    batch = step(s)
    assert [req.rid for req in batch.retracted] == ["low"] and rids(batch) == ["c"]
    low = batch.retracted[0]
    finish_all(s)
    assert low.finish.status == "finished" and low.output_len == 10 and low.cached_tokens <= 20


def test_a_difference_below_the_threshold_preempts_nobody():
    s = preempting()
    low_and_high(s)
    s.receive([generate("c", words(300, 20), 5, priority=1)])
    assert not step(s).retracted


def test_a_victim_that_frees_nothing_is_left_alone():
    s = preempting("radix", share_in_batch_tokens=None)
    # Both hold the same 60 cached tokens: taking the lower one's place frees none of them.
    s.receive([generate("warm", words(0, 60), 1)])
    step(s)
    s.receive([generate("low", words(0, 60), 5), generate("high", words(0, 60), 5, priority=5)])
    step(s)
    s.receive([generate("c", words(300, 60), 5, priority=5)])
    for _ in range(3):
        batch = step(s)
        assert not batch.retracted and rids(batch) == ["high", "low"]


def test_one_is_preempted_for_its_row_alone():
    s = preempting(max_running=1)
    s.receive([generate("low", words(0, 10), 10)])
    step(s)
    s.receive([generate("c", words(300, 10), 5, priority=4)])
    batch = step(s)
    assert [req.rid for req in batch.retracted] == ["low"] and rids(batch) == ["c"]
    finish_all(s)


@every_loop
@both_batchings
@pytest.mark.parametrize("chunk", [8192, 16])
def test_a_request_for_no_output_computes_its_prompt_and_leaves_it_in_the_cache(loop, batching, chunk):
    jobs = [
        Job("busy", words(500, 10), 9, eos=False),
        Job("a", words(0, 40), 1, bound=0),
        Job("b", words(0, 50), 2, eos=False, arrival_s=1.0),
        Job("c", words(0, 40), 1, bound=0, arrival_s=2.0),
    ]
    run = simulate(jobs, loop, batching=batching, chunk=chunk)
    assert {rid: run.ended[rid].finish.status for rid in "abc"} == dict.fromkeys("abc", "finished")
    assert run.ended["a"].finish.kind == "length"
    assert "a" not in run.outputs and "a" not in run.first_s and run.ended["a"].output_len == 0
    assert run.ended["b"].cached_tokens == 40
    assert run.ended["c"].cached_tokens == 39, "one token is computed all the same"
    mine = [(batch.worker, i) for batch in run.batches for i, req in enumerate(batch.reqs) if req.rid == "a"]
    assert [int(worker.seq_lens[i]) for worker, i in mine][-1] == 40
    assert all(i in worker.unsampled for worker, i in mine)
    assert sum(batch.worker.num_samples for batch in run.batches) == len(run.outputs["busy"]) + len(run.outputs["b"])
