"""Traps of prompts that are computed in chunks."""

from __future__ import annotations

import pytest

from tests.scheduler.by_hand import (
    EOS,
    all_finished,
    both_batchings,
    every_loop,
    extends,
    finish_all,
    form,
    generate,
    process,
    rids,
    scheduler,
    step,
    words,
)
from tests.world import Job, simulate
from workbench.scheduler.messages import Abort


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
    assert s.slots.chunked is None
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
        run = simulate(
            jobs, loop, max_running=max_running, slots=slots, chunk=16, batching=batching, max_batch_tokens=20
        )
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
