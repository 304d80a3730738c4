"""Traps that schedulers fall into, one small test each: docs call it the checklist."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import pytest

from backends.simulated.sampler import END_OF_SEQUENCE
from tests.world import Job, Run, simulate
from workbench.scheduler.config import ConfigError, SchedulerConfig
from workbench.scheduler.messages import Abort, FlushCache, Generate, Pause, Resume
from workbench.scheduler.policy import Policy
from workbench.scheduler.request import Req, SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult

LOOPS = ["normal", "overlap", "pipeline"]
every_loop = pytest.mark.parametrize("loop", LOOPS)
both_batchings = pytest.mark.parametrize("batching", ["prefill-first", "mixed"])
EOS = END_OF_SEQUENCE


def words(start: int, count: int) -> list[int]:
    """A prompt that shares nothing with one that starts elsewhere."""
    return list(range(start, start + count))


# -- a scheduler by hand, without a loop -------------------------------------------------------------------------------


def scheduler(**settings: object) -> Scheduler:
    config = SchedulerConfig(**{"kv_tokens": 1000, "max_context": 500, **settings})  # type: ignore[arg-type]
    return Scheduler(config, eos_token_ids=(EOS,))


def generate(rid: str, prompt: list[int], new: int, **more: object) -> Generate:
    return Generate(rid, np.array(prompt, np.int32), SamplingParams(new), **more)  # type: ignore[arg-type]


def process(s: Scheduler, batch: ScheduleBatch, token: int = 7) -> StepResult:
    result = s.process(batch, np.full(len(batch.reqs), token, np.int32))
    s.check()
    return result


def form(s: Scheduler, slot: int = 0) -> ScheduleBatch:
    batch = s.next_batch(slot)
    assert batch is not None
    s.check()
    return batch


def step(s: Scheduler, token: int = 7) -> ScheduleBatch:
    batch = form(s)
    process(s, batch, token)
    return batch


def finish_all(s: Scheduler) -> list[ScheduleBatch]:
    batches = []
    while not s.idle:
        batch = s.next_batch()
        if batch is not None:
            process(s, batch)
            batches.append(batch)
    s.rest()
    return batches


def rids(batch: ScheduleBatch) -> list[str]:
    return [req.rid for req in batch.reqs]


def extends(batch: ScheduleBatch) -> list[int]:
    return [] if batch.worker.extend_lens is None else batch.worker.extend_lens.tolist()


def all_finished(run: Run, jobs: list[Job]) -> None:
    assert {rid: req.finish.status for rid, req in run.ended.items()} == {job.rid: "finished" for job in jobs}
    for job in jobs:
        assert run.outputs[job.rid] == job.script()[1].tolist()
        assert run.ended[job.rid].cached_tokens < len(job.prompt)


# -- overlap -----------------------------------------------------------------------------------------------------------


@every_loop
def test_a_request_for_one_token_takes_one_batch(loop):
    run = simulate([Job("a", words(0, 10), 1, eos=False)], loop)
    assert [batch.worker.mode for batch in run.batches] == ["prefill"]
    assert run.first_s == run.end_s
    assert run.outputs["a"] == [900_000]


@every_loop
def test_the_first_batch_after_every_idle_gap_is_like_the_first_of_all(loop):
    jobs = [Job(f"r{i}", words(100 * i, 10), 3, bound=8, arrival_s=10.0 * i) for i in range(4)]
    run = simulate(jobs, loop)
    all_finished(run, jobs)
    waits = {round(run.first_s[job.rid] - job.arrival_s, 9) for job in jobs}
    assert len(waits) == 1


def test_a_request_that_finishes_in_the_batch_before_is_dropped_from_the_one_in_flight():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 20)])
    first, second = form(s), form(s)
    ended = process(s, first, EOS).ended
    assert [req.rid for req in ended] == ["a"] and ended[0].output_len == 1
    assert s.next_batch() is None and not s.idle
    assert not process(s, second).ended
    assert second.dropped == {0}
    s.rest()


def test_a_row_is_not_given_to_another_while_a_batch_in_flight_reads_it():
    s = scheduler(max_running=1)
    s.receive([generate("a", words(0, 10), 20), generate("b", words(50, 10), 20)])
    first, second = form(s), form(s)
    process(s, first, EOS)
    assert s.next_batch() is None
    process(s, second)
    assert rids(form(s)) == ["b"]


def test_a_stop_by_length_is_known_at_launch_and_is_in_no_later_batch():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 2), generate("b", words(50, 10), 3)])
    batches = [form(s), form(s), form(s)]
    assert [rids(batch) for batch in batches] == [["a", "b"], ["a", "b"], ["b"]]
    assert s.next_batch() is None
    assert [[r.rid for r in process(s, batch).ended] for batch in batches] == [[], ["a"], ["b"]]


def test_an_abort_between_launch_and_result_drops_the_result_and_frees_once():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 20)])
    step(s)
    second, third = form(s), form(s)
    s.receive([Abort("a")])
    (ended,) = s.take_ended()
    assert ended.finish.status == "aborted:client" and ended.output_len == 1
    assert not process(s, second).ended and not process(s, third).ended
    assert second.dropped == third.dropped == {0}
    assert s.idle
    s.rest()


@every_loop
def test_a_client_gets_no_token_after_its_abort_and_its_count_is_right(loop):
    job = Job("a", words(0, 100), 50, bound=60)
    run = simulate([job], loop, messages=[(0.055, Abort("a"))])
    assert run.ended["a"].finish.status == "aborted:client"
    assert run.ended["a"].output_len == len(run.outputs["a"]) > 1


@every_loop
def test_a_retraction_while_in_flight_loses_no_token(loop):
    jobs = [Job(f"r{i}", words(100 * i, 10), 20, arrival_s=0.005 * i, eos=False) for i in range(3)]
    run = simulate(jobs, loop, kv_tokens=84, conservativeness=0.001)
    all_finished(run, jobs)
    assert sum(req.retractions for req in run.ended.values()) > 0
    assert any(batch.late for batch in run.batches) == (loop == "overlap")


def test_a_retracted_request_whose_last_sample_is_in_flight_may_end_with_it():
    jobs = [Job(f"r{i}", words(100 * i, 10), n, bound=25, arrival_s=0.005 * i) for i, n in enumerate((12, 13, 12))]
    for kv_tokens in range(40, 80):  # some of these retract one in the very step of its EOS
        run = simulate(jobs, "overlap", kv_tokens=kv_tokens, conservativeness=0.001)
        all_finished(run, jobs)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_chunk_is_used_by_the_next_prompt():
    s = scheduler(chunk=50)
    s.receive([generate("a", words(0, 30), 1), generate("b", words(100, 40), 1), generate("c", words(200, 40), 1)])
    assert [extends(batch) for batch in finish_all(s)] == [[30, 20], [20, 30], [10]]


def test_a_chunk_that_is_not_the_last_emits_nothing():
    s = scheduler(chunk=16)
    s.receive([generate("a", words(0, 40), 5)])
    for expected in ([0], [0], None):
        batch = form(s)
        assert (None if batch.worker.unsampled is None else batch.worker.unsampled.tolist()) == expected
        # Even a sample that looks like a stop.
        result = process(s, batch, EOS if expected else 7)
        assert not result.ended and [r.rid for r in result.first] == ([] if expected else ["a"])


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abort_in_the_middle_of_a_chunked_prompt_gives_everything_back(in_flight):
    s = scheduler(chunk=16)
    s.receive([generate("a", words(0, 100), 5), generate("b", words(200, 10), 2)])
    step(s)
    batch = form(s)
    if not in_flight:
        process(s, batch)
    s.receive([Abort("a")])
    s.check()
    assert s.state.chunked is None
    (ended,) = s.take_ended()
    assert ended.finish.status == "aborted:client" and ended.output_len == 0
    if in_flight:
        process(s, batch)
    assert [rids(b) for b in finish_all(s)] == [["b"], ["b"]]


@every_loop
@both_batchings
def test_a_prompt_in_chunks_goes_on_while_all_rows_are_taken(loop, batching):
    jobs = [Job(f"r{i}", words(100 * i, 60), 15, eos=False) for i in range(5)]
    slots = 2 if loop == "pipeline" else 1
    for max_running in (1, 2, 3):
        run = simulate(jobs, loop, max_running=max_running, slots=slots, chunk=16, batching=batching,
                       max_batch_tokens=20)  # fmt: skip
        all_finished(run, jobs)


@pytest.mark.parametrize(("page_size", "cached"), [(1, 39), (4, 36), (16, 32)])
def test_of_a_prompt_that_is_cached_whole_at_least_one_token_is_computed(page_size, cached):
    s = scheduler(page_size=page_size)
    s.receive([generate("a", words(0, 40), 1)])
    step(s)
    s.receive([generate("b", words(0, 40), 1)])
    batch = step(s)
    assert extends(batch) == [40 - cached]
    assert batch.reqs[0].cached_tokens == cached
    assert batch.reqs[0].finish.status == "finished"


def test_a_cached_prefix_costs_nothing_of_the_chunk_budget():
    s = scheduler(chunk=16)
    s.receive([generate("a", words(0, 40), 1)])
    finish_all(s)
    s.receive([generate("b", words(0, 70), 1)])
    first, second = step(s), step(s)
    assert (extends(first), extends(second)) == ([16], [14])
    assert first.reqs[0].cached_tokens == 40
    assert len(first.worker.new_requests) == 1 and second.worker.new_requests == ()
    assert first.worker.seq_lens.tolist() == [56]


def test_chunks_are_cut_at_whole_pages():
    s = scheduler(chunk=30, page_size=8)
    s.receive([generate("a", words(0, 60), 1)])
    assert [extends(batch) for batch in finish_all(s)] == [[24], [24], [12]]


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
        (words(0, 5), 0, 100, "no_output_asked"),
    ],
)
def test_what_can_never_run_is_refused_at_once_with_a_reason(prompt, new, max_context, reason):
    s = scheduler(kv_tokens=80, max_context=max_context)
    s.receive([generate("a", prompt, new)])
    (ended,) = s.take_ended()
    assert ended.finish.status == f"rejected:{reason}"
    assert not s.state.waiting and s.idle


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
    assert s.state.waiting[0].max_new == 50 - 40 - 1


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
    assert s.state.cache.tree.evictable_pages == 60
    assert all(req.finish is None for req in s.state.waiting)


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
    assert s.state.new_token_ratio == pytest.approx((140 + 40) / 201)
    assert s.state.waiting[0].rid == "b" and s.state.waiting[0].output_len == 70
    assert len(s.state.waiting[0].tokens) == 12 + 70


def test_the_expectation_decays_with_every_decode_and_is_reset_when_idle():
    s = scheduler(max_context=2000, kv_tokens=2000)
    assert s.state.new_token_ratio == pytest.approx(0.7)
    s.receive([generate("a", words(0, 10), 700)])
    step(s)
    assert s.state.new_token_ratio == pytest.approx(0.7)  # a prefill is no decode
    for _ in range(100):
        step(s)
    assert s.state.new_token_ratio == pytest.approx(0.7 - 100 * (0.7 - 0.7 * 0.14) / 600)
    for _ in range(550):
        step(s)
    assert s.state.new_token_ratio == pytest.approx(0.7 * 0.14)
    finish_all(s)
    assert s.state.new_token_ratio == pytest.approx(0.7)


def test_the_expectation_starts_at_one_at_most():
    assert scheduler(conservativeness=3.0).state.new_token_ratio == 1.0


def test_the_tail_that_fills_no_page_is_freed_and_the_rest_is_cached():
    s = scheduler(page_size=16, kv_tokens=160)
    s.receive([generate("a", words(0, 40), 1)])
    step(s)
    assert s.state.cache.tree.evictable_pages == 2 and s.state.cache.pool.free == 8


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


# -- pipeline ----------------------------------------------------------------------------------------------------------


@both_batchings
def test_two_slots_share_a_single_place(batching):
    jobs = [Job(f"r{i}", words(100 * i, 30), 5, bound=9) for i in range(4)]
    run = simulate(jobs, "pipeline", slots=2, max_running=1, chunk=16, batching=batching)
    all_finished(run, jobs)
    assert all(len(batch.reqs) == 1 for batch in run.batches)


@both_batchings
def test_a_prompt_in_chunks_spans_slots(batching):
    jobs = [Job("a", words(0, 100), 5, bound=9), Job("b", words(200, 30), 5, bound=9)]
    run = simulate(jobs, "pipeline", slots=3, chunk=16, max_batch_tokens=16, batching=batching, max_running=6)
    all_finished(run, jobs)
    assert {batch.slot for batch in run.batches if "a" in rids(batch) and batch.worker.num_prefill} == {0, 1, 2}


def test_empty_slots_are_passed_over():
    run = simulate([Job("a", words(0, 10), 5, eos=False)], "pipeline", slots=4)
    assert len(run.batches) == 5 and len({batch.slot for batch in run.batches}) == 1


# -- what is shared ----------------------------------------------------------------------------------------------------


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
        assert s.state.cache.pool.free == s.state.cache.pool.total


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
    kept = {n: s.state.cache.tree.match(np.array(p, np.int32), touch=False)[1] == 30 for n, p in prompts.items()}
    assert [name for name, whole in kept.items() if not whole] == [gone]


def test_a_flush_forgets_what_nobody_uses_and_spares_what_is_in_use():
    s = scheduler()
    s.receive([generate("a", words(0, 40), 1), generate("b", words(100, 40), 5)])
    step(s)
    step(s)
    s.receive([FlushCache()])
    s.check()
    assert s.state.cache.tree.evictable_pages == 0 and s.state.cache.tree.protected_pages == 40
    s.receive([generate("c", words(0, 40), 1)])
    assert step(s).reqs[0].cached_tokens == 0
    finish_all(s)


# -- mixed batches -----------------------------------------------------------------------------------------------------


@every_loop
def test_a_mixed_step_never_exceeds_its_token_budget_and_uses_it(loop):
    jobs = [Job(f"r{i}", words(100 * i, 50), 20, bound=30) for i in range(8)]
    run = simulate(jobs, loop, batching="mixed", max_batch_tokens=32, max_running=8)
    all_finished(run, jobs)
    sizes = [batch.worker.prefill_tokens + batch.worker.decode_tokens for batch in run.batches]
    assert max(sizes) == 32
    assert any(batch.worker.mode == "mixed" for batch in run.batches)


@every_loop
def test_mixed_batching_preempts_the_newest_and_admits_nobody_in_that_step(loop):
    jobs = [Job(f"r{i}", words(100 * i, 10), 30, eos=False) for i in range(3)]
    run = simulate(jobs, loop, batching="mixed", kv_tokens=64)
    all_finished(run, jobs)
    hit = [batch for batch in run.batches if batch.retracted]
    assert [req.rid for req in hit[0].retracted] == ["r2"]
    assert all(batch.worker.num_prefill == 0 for batch in hit)


def test_mixed_chunk_lets_decodes_join_a_prefill_and_pays_for_them_from_its_budget():
    for mixed_chunk, mode, extend in ((True, "mixed", 31), (False, "prefill", 32)):
        s = scheduler(chunk=32, mixed_chunk=mixed_chunk, max_running=8)
        s.receive([generate("a", words(0, 10), 9)])
        step(s)
        s.receive([generate("b", words(100, 60), 3)])
        batch = step(s)
        assert (batch.worker.mode, extends(batch)) == (mode, [extend])
        assert rids(batch) == (["b", "a"] if mixed_chunk else ["b"])
        finish_all(s)


# -- the order of the queue --------------------------------------------------------------------------------------------


def order_of(run: Run, names: str) -> str:
    return "".join(sorted(names, key=lambda rid: run.scheduled_s[rid]))


@pytest.mark.parametrize(
    ("policy", "order"),
    [("fcfs", "abc"), ("lpm", "bac"), ("lof", "acb"), ("sjf", "cba"), ("edf", "bca"), ("priority", "cab")],
)
def test_policies_that_should_differ_do(policy, order):
    shared = words(500, 40)
    jobs = [
        Job("w", shared, 20, eos=False),  # keeps the only place until the others have come
        Job("a", words(0, 30), 5, priority=1, slo_ttft_s=5.0, arrival_s=0.001, eos=False),
        Job("b", shared + words(100, 25), 3, priority=0, slo_ttft_s=1.0, arrival_s=0.001, eos=False),
        Job("c", words(200, 10), 4, priority=2, slo_ttft_s=3.0, arrival_s=0.001, eos=False),
    ]
    run = simulate(jobs, policy=policy, max_running=1)
    assert order_of(run, "abc") == order


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abc"), ("lpm", "abc"), ("dfs-weight", "bca")])
def test_dfs_weight_takes_the_prefix_with_the_most_waiting_first(policy, order):
    light, heavy = words(500, 40), words(600, 40)
    jobs = [
        Job("v", light, 1, eos=False),
        Job("w", heavy, 20, eos=False),
        Job("a", [*light, 1], 2, arrival_s=0.02, eos=False),
        Job("b", [*heavy, 2], 2, arrival_s=0.02, eos=False),
        Job("c", [*heavy, 3], 2, arrival_s=0.02, eos=False),
    ]
    run = simulate(jobs, policy=policy, max_running=1)
    assert order_of(run, "abc") == order


def test_a_late_request_goes_last_under_edf():
    jobs = [
        Job("w", words(500, 40), 20, eos=False),
        Job("a", words(0, 10), 2, slo_ttft_s=0.05, arrival_s=0.001, eos=False),  # late before w is done
        Job("b", words(100, 10), 2, slo_ttft_s=9.0, arrival_s=0.001, eos=False),
    ]
    assert order_of(simulate(jobs, policy="edf", max_running=1), "ab") == "ba"


def test_random_is_a_matter_of_the_seed():
    names = "abcdefgh"
    jobs = [Job(name, words(100 * i, 10), 2, eos=False) for i, name in enumerate(names)]
    orders = [order_of(simulate(jobs, policy="random", max_running=1, seed=seed), names) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "lof", "sjf", "edf", "priority"])
def test_of_equals_that_arrive_together_the_first_goes_first(policy):
    names = "abcdefgh"
    jobs = [Job(name, words(100 * i, 10), 2, eos=False) for i, name in enumerate(names)]
    assert order_of(simulate(jobs, policy=policy, max_running=1), names) == names


@pytest.mark.parametrize("limit", [1, 3, None])
def test_a_long_prompt_is_passed_over_no_more_than_the_limit_under_sjf(limit):
    shorts = [Job(f"s{i}", words(100 * i, 5), 1, eos=False) for i in range(12)]
    jobs = [Job("long", words(5000, 400), 1, eos=False), *shorts]
    run = simulate(jobs, policy="sjf", max_running=1, max_passed_over=limit)
    before = sum(run.scheduled_s[job.rid] < run.scheduled_s["long"] for job in shorts)
    assert before == (len(shorts) if limit is None else limit)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_no_more_prefills_in_a_row_than_the_limit_while_decodes_wait(limit):
    jobs = [Job(f"r{i}", words(100 * i, 20), 30, eos=False) for i in range(9)]
    run = simulate(jobs, max_prefill_streak=limit, max_prefill_tokens=20)
    streaks = [len(list(group)) for mode, group in groupby(b.worker.mode for b in run.batches) if mode == "prefill"]
    assert max(streaks) == (9 if limit is None else limit)


class Backwards(Policy):
    """Last come, first served: somebody's own policy."""

    def order(self, waiting, view):
        return waiting[::-1]


class Forgetful(Policy):
    def order(self, waiting, view):
        return waiting[1:]


class Repetitive(Policy):
    def order(self, waiting, view):
        return [waiting[0]] * len(waiting)


class NoPolicy:
    pass


def test_a_policy_of_ones_own_is_loaded_by_its_import_path():
    jobs = [Job(name, words(100 * i, 10), 2, eos=False) for i, name in enumerate("abc")]
    run = simulate(jobs, policy=f"{__name__}:Backwards", max_running=1)
    assert order_of(run, "abc") == "cba"


@pytest.mark.parametrize("name", ["Forgetful", "Repetitive"])
@both_batchings
def test_a_policy_that_does_not_return_a_permutation_is_refused(name, batching):
    s = scheduler(policy=f"{__name__}:{name}", batching=batching)
    s.receive([generate("a", words(0, 10), 1), generate("b", words(50, 10), 1)])
    with pytest.raises(ConfigError, match=f"^policy: {name}.order did not return a permutation"):
        s.next_batch()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("fifo", "policy: 'fifo' is not one of fcfs, lpm, .*, nor module:Class"),
        ("no.such.module:P", "policy: cannot load 'no.such.module:P': No module named"),
        (f"{__name__}:Missing", "policy: cannot load .* has no attribute 'Missing'"),
        (f"{__name__}:NoPolicy", "policy: .* is not a subclass of workbench.scheduler.policy.Policy"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_a_clear_error(policy, message):
    with pytest.raises(ConfigError, match="^" + message):
        scheduler(policy=policy)


# -- messages and time -------------------------------------------------------------------------------------------------


def test_a_message_of_an_unknown_type_is_a_clear_error():
    with pytest.raises(TypeError, match="no handler for a message of type dict"):
        scheduler().receive([{"generate": "a"}])


def test_an_abort_of_an_unknown_or_finished_request_is_ignored():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 1), Abort("nobody")])
    step(s)
    s.receive([Abort("a")])
    assert s.take_ended() == [] and s.idle


def test_an_abort_in_the_queue_takes_the_request_out_of_it():
    s = scheduler(max_running=1)
    s.receive([generate("a", words(0, 10), 3), generate("b", words(50, 10), 3), Abort("b", "why not")])
    (ended,) = s.take_ended()
    assert ended.finish.status == "aborted:why not" and ended.output_len == 0
    assert {rid for batch in finish_all(s) for rid in rids(batch)} == {"a"}


@every_loop
def test_while_paused_nothing_starts_and_nothing_spins(loop):
    job = Job("a", words(0, 100), 5, arrival_s=0.1, eos=False)
    run = simulate([job], loop, messages=[(0.05, Pause()), (3.0, Resume())])
    assert run.scheduled_s["a"] == 3.0
    all_finished(run, [job])
    asleep = simulate([job], loop, messages=[(0.125, Pause())])
    assert not asleep.ended and len(asleep.batches) < 5


@every_loop
def test_a_request_that_waits_too_long_is_aborted_and_a_running_one_is_not(loop):
    jobs = [Job("a", words(0, 100), 30, eos=False), Job("b", words(200, 10), 3, eos=False)]
    run = simulate(jobs, loop, max_running=1, queue_timeout_s=0.1)
    assert run.ended["a"].finish.status == "finished"
    assert run.ended["b"].finish.status == "aborted:queue_timeout"
    assert "b" not in run.scheduled_s and run.end_s["b"] < run.end_s["a"]


@every_loop
def test_a_request_that_takes_too_long_is_aborted_wherever_it_is(loop):
    jobs = [Job("a", words(0, 100), 90, eos=False), Job("b", words(200, 10), 3, eos=False)]
    run = simulate(jobs, loop, max_running=1, request_timeout_s=0.1)
    for rid in "ab":
        assert run.ended[rid].finish.status == "aborted:request_timeout"
        assert 0.1 <= run.end_s[rid] < 0.2
    assert run.ended["a"].output_len == len(run.outputs["a"]) > 0


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({name: 0}, f"{name}: 0 is less than 1") for name in (
            "kv_tokens", "max_context", "page_size", "max_running", "slots", "max_prefill_tokens", "max_batch_tokens",
            "chunk", "max_passed_over", "max_prefill_streak", "share_in_batch_tokens", "preempt_threshold")],
        ({"queue_timeout_s": 0}, "queue_timeout_s: 0 is not positive"),
        ({"request_timeout_s": -1.5}, "request_timeout_s: -1.5 is not positive"),
        ({"request_timeout_s": math.nan}, "request_timeout_s: nan is not positive"),
        ({"conservativeness": 0.0}, "conservativeness: 0.0 is not positive"),
        ({"batching": "decode-first"}, "batching: 'decode-first' is not one of prefill-first, mixed"),
        ({"cache": "lru"}, "cache: 'lru' is not one of radix, none"),
        ({"evict": "mru"}, "evict: 'mru' is not one of lru, lfu, fifo"),
        ({"kv_tokens": 15, "page_size": 16}, "kv_tokens: 15 holds no page of 16 tokens"),
        ({"chunk": 15, "page_size": 16}, "chunk: 15 is smaller than a page of 16 tokens"),
        ({"batching": "mixed", "max_batch_tokens": 7, "max_running": 8},
         "max_batch_tokens: 7 cannot give each of 8 running requests a token; raise it or lower max_running"),
        ({"batching": "mixed", "max_batch_tokens": 15, "page_size": 16, "max_running": 8},
         "max_batch_tokens: 15 is smaller than a page of 16"),
        ({"mixed_chunk": True, "batching": "mixed"}, "mixed_chunk: needs prefill-first batching with a chunk size"),
        ({"mixed_chunk": True, "chunk": None}, "mixed_chunk: needs prefill-first batching with a chunk size"),
        ({"mixed_chunk": True, "chunk": 8, "max_running": 8},
         "chunk: 8 leaves no room for a prompt beside 8 decodes (mixed_chunk)"),
        ({"preempt_threshold": 1}, "preempt_threshold: needs policy 'priority'"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_work_is_refused_in_one_line_that_names_it(settings, message):
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{"kv_tokens": 1000, "max_context": 500, **settings})
    assert str(caught.value) == message


def test_a_slot_has_its_share_of_the_places_and_at_least_one():
    shares = [SchedulerConfig(100, 50, max_running=n, slots=4).max_running_per_slot for n in (1, 4, 7, 8)]
    assert shares == [1, 1, 1, 2]


def test_a_request_knows_at_which_length_it_stops():
    req = Req("a", np.zeros(10, np.int32), SamplingParams(5), 5, 0)
    assert req.end_len == 14  # the fifth token is never an input
