"""Traps of batches that are formed before others are processed: overlap, pipeline, mixed batches."""

from __future__ import annotations

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
    jobs = [Job(f"r{i}", words(100 * i, 6), n, bound=25, arrival_s=0.005 * i) for i, n in enumerate((23, 19, 20))]
    in_the_queue = set()
    for kv_tokens in range(45, 80):  # some of these retract one in the very step of its EOS
        run = simulate(jobs, "overlap", kv_tokens=kv_tokens, conservativeness=0.001)
        all_finished(run, jobs)
        in_the_queue |= {
            rid
            for rid, req in run.ended.items()
            if req.retractions and len(req.tokens) == req.input_len + req.output_len
        }
    assert in_the_queue == {"r1", "r2"}


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


# -- preemption --------------------------------------------------------------------------------------------------------


@every_loop
def test_an_urgent_request_takes_the_only_row_from_one_that_is_in_flight(loop):
    jobs = [
        Job("low", words(0, 10), 40, eos=False),
        Job("urgent", words(300, 10), 5, arrival_s=0.1, priority=4, eos=False),
    ]
    run = simulate(jobs, loop, policy="priority", preempt_threshold=2, max_running=1)
    all_finished(run, jobs)
    assert run.end_s["urgent"] < run.end_s["low"]
    assert run.ended["low"].retractions == 1
