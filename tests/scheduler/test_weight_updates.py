"""Other weights in the middle of a run, and profiles: what the scheduler does about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loops.test_loop_properties import check_the_end, check_the_pools, some_jobs, some_settings, thorough
from tests.scheduler.by_hand import (
    EOS,
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
from tests.world import Job, Run, simulate
from workbench.scheduler.decided import decided_steps
from workbench.scheduler.messages import Abort, Pause, Profile, Resume, UpdateWeights
from workbench.scheduler.scheduler import Scheduler


class Weights:
    """Notes what the scheduler does with an update; ``refused`` is why its check fails."""

    def __init__(self, refused: str | None = None) -> None:
        self.refused = refused
        self.done: list[str | None] = []

    def check(self) -> None:
        self.done.append("check")
        if self.refused is not None:
            raise ValueError(self.refused)

    def message(self, write: Any = None) -> UpdateWeights:
        return UpdateWeights(self.check, write or (lambda: self.done.append("write")), self.done.append)


TAKEN = ["check", "write", None]


def standing(s: Scheduler) -> tuple[Any, ...]:
    """Everything that an update takes away or keeps."""
    nodes = [(node.pages.tolist(), node.key.tolist(), node.locks) for node in s.kv.cache.nodes()]
    running = [([req.rid for req in slot.running.reqs], slot.running.lens.tolist()) for slot in s.slots]
    held = [(req.rid, req.row, req.kv_len, req.tokens.tolist(), req.retractions) for req in s.lifecycle.by_id.values()]
    return nodes, running, held, s.kv.pool.free_pages().tolist(), [req.rid for req in s.queue.waiting]


# -- by hand -----------------------------------------------------------------------------------------------------------


def crowd() -> Scheduler:
    """One request decodes, one is partly prefilled, one waits, and a prefix of one that has ended is cached."""
    s = scheduler(chunk=8, max_running=2)
    s.receive([generate("gone", words(100, 6), 1)])
    step(s)
    s.receive([generate("runs", words(0, 6), 20)])
    step(s)
    s.receive([generate("chunked", words(50, 20), 5), generate("waits", words(100, 8), 5)])
    step(s)
    assert s.slots.chunked is not None and s.kv.cache.counts.evictable_pages
    return s


def test_everybody_computes_again_what_the_new_weights_would_have_computed_otherwise():
    s, weights = crowd(), Weights()
    s.receive([weights.message(lambda: weights.done.append("write" if not list(s.kv.cache.nodes()) else "?"))])
    assert weights.done == [], "nothing happens between batches that are not asked for"
    batch = form(s)
    assert weights.done == TAKEN
    # In order of arrival: the prompt with the token that was generated, whole prompts for the others, nothing cached.
    assert rids(batch) == ["runs", "chunked"] and extends(batch) == [7, 1]
    assert [req.rid for req in batch.retracted] == ["runs", "chunked"]
    assert [row.cached for row in batch.prefill] == [0, 0]
    process(s, batch)
    rest = finish_all(s)
    assert s.kv.used_tokens == 0
    (waited,) = [row for batch in rest for row in batch.prefill if row.req.rid == "waits" and row.start == row.cached]
    assert waited.cached == 0, "a prefix of before the update was matched"
    assert [waited.req.output_len, waited.req.retractions] == [5, 0]


def test_no_batch_is_formed_before_those_in_flight_are_over():
    s, weights = scheduler(), Weights()
    s.receive([generate("a", words(0, 6), 20), generate("b", words(50, 6), 2)])
    first, second = form(s), form(s)
    s.receive([weights.message(), generate("c", words(90, 4), 2)])
    assert s.next_batch() is None and not s.idle
    process(s, first)
    assert s.next_batch() is None and weights.done == []
    assert [req.rid for req in process(s, second).ended] == ["b"]
    batch = form(s)
    assert weights.done == TAKEN
    assert rids(batch) == ["a", "c"] and extends(batch) == [8, 4]
    assert batch.prefill[0].req.tokens.tolist() == [*words(0, 6), 7, 7]
    process(s, batch)
    finish_all(s)


def test_a_request_that_ends_in_the_last_batch_before_an_update_leaves_nothing_to_wait_for():
    s, weights = scheduler(), Weights()
    s.receive([generate("a", words(0, 6), 20)])
    first, second = form(s), form(s)
    s.receive([weights.message()])
    assert s.next_batch() is None
    process(s, first, EOS)
    process(s, second)
    assert not s.idle, "the update waits"
    assert s.next_batch() is None and weights.done == TAKEN
    assert s.idle and not list(s.kv.cache.nodes())
    s.rest()


def test_each_slot_of_a_pipeline_is_emptied():
    s, weights = scheduler(slots=2, max_running=4, chunk=4), Weights()
    s.receive([generate("a", words(0, 4), 9), generate("b", words(50, 4), 9), generate("c", words(70, 12), 9)])
    flying = [form(s, 0), form(s, 1)]
    s.receive([weights.message()])
    for batch in flying:
        assert s.next_batch(1 - batch.slot) is None and weights.done == []
        process(s, batch)
    batch = form(s, 1)
    assert weights.done == TAKEN and rids(batch) == ["a"] and extends(batch) == [4]
    assert s.slots.running_count + len(s.queue.waiting) + (s.slots.chunked is not None) == 3
    assert s.slots[0].running.count == 0
    process(s, batch)
    slot = 0
    while not s.idle:
        batch = s.next_batch(slot)
        slot = 1 - slot
        if batch is not None:
            process(s, batch)


def test_a_refused_update_changes_nothing():
    s, undisturbed, weights = crowd(), crowd(), Weights("no such folder")
    s.receive([weights.message()])
    batch, same = form(s), form(undisturbed)
    assert weights.done == ["check", "no such folder"]
    assert standing(s) == standing(undisturbed)
    assert (rids(batch), extends(batch), batch.retracted) == (rids(same), extends(same), same.retracted)


def test_a_paused_scheduler_updates_at_once_and_stays_paused():
    s, weights = crowd(), Weights()
    s.receive([Pause(), weights.message()])
    assert s.next_batch() is None and weights.done == TAKEN
    s.check()
    assert s.paused and s.idle, "only a message changes that"
    s.rest()
    s.receive([Abort("chunked")])
    assert s.next_batch() is None and [req.rid for req in s.take_ended()] == ["chunked"]
    s.receive([Resume()])
    batch = form(s)
    assert rids(batch) == ["runs", "waits"]
    assert [req.rid for req in batch.retracted] == ["runs"], "who has ended is no news of a later batch"
    process(s, batch)
    finish_all(s)


def test_pausing_and_resuming_do_not_let_go_of_an_update_that_waits():
    s, weights = scheduler(), Weights()
    s.receive([generate("a", words(0, 6), 20)])
    flying = form(s)
    s.receive([weights.message(), Pause(), Resume()])
    assert s.next_batch() is None and weights.done == []
    process(s, flying)
    assert rids(form(s)) == ["a"] and weights.done == TAKEN


def test_updates_are_done_in_their_order_and_one_that_is_refused_does_not_stop_the_next():
    s, one, two, three = crowd(), Weights(), Weights("wrong"), Weights()
    s.receive([one.message(), two.message(), three.message()])
    batch = form(s)
    assert (one.done, two.done, three.done) == (TAKEN, ["check", "wrong"], TAKEN)
    assert [req.retractions for req in batch.reqs] == [1, 1]


def test_what_a_failed_write_raises_ends_the_loop():
    s, weights = crowd(), Weights()

    def fail() -> None:
        raise RuntimeError("half of it")

    s.receive([weights.message(fail)])
    with pytest.raises(RuntimeError, match="half of it"):
        s.next_batch()
    assert weights.done == ["check"], "it was not said to be done"


def test_no_step_is_decided_while_an_update_waits():
    s = scheduler()
    s.receive([generate("a", words(0, 6), 200)])
    step(s)
    form(s)
    assert decided_steps(s, 10) is not None
    s.receive([Weights().message()])
    assert decided_steps(s, 10) is None


def test_a_profile_begins_between_two_batches_or_says_why_not():
    s = scheduler()
    told: list[Any] = []

    def refuse() -> None:
        raise ValueError("there is one already")

    s.receive([Profile(lambda: told.append("begun"), told.append), Profile(refuse, told.append)])
    assert told == ["begun", None, "there is one already"]


# -- under the loops ---------------------------------------------------------------------------------------------------


def updated_at(loop: str, at_s: float, jobs: list[Job], **settings: Any) -> tuple[Weights, Run]:
    weights = Weights()
    run = simulate(jobs, loop, messages=[(at_s, weights.message())], slots=2 if loop == "pipeline" else 1, **settings)
    return weights, run


@every_loop
def test_an_idle_scheduler_answers_at_once_and_not_with_the_next_request(loop):
    jobs = [Job("a", words(0, 30), 3), Job("b", words(0, 30), 3, arrival_s=50.0)]
    weights, run = updated_at(loop, 10.0, jobs, until_s=10.1)
    assert weights.done == TAKEN and list(run.ended) == ["a"]
    _, run = updated_at(loop, 10.0, jobs)
    check_the_end(jobs, run)
    assert run.ended["b"].cached_tokens == 0, "matched what the old weights had computed"


@every_loop
def test_requests_go_on_where_they_were_in_every_loop(loop):
    jobs = [Job(f"r{i}", words(100 * i, 20 + 30 * i), 25) for i in range(6)]
    weights, run = updated_at(loop, 0.1, jobs, chunk=32, max_running=4)
    check_the_end(jobs, run)
    assert weights.done == TAKEN
    assert sum(req.retractions for req in run.ended.values()) >= 2


@st.composite
def an_update(draw: st.DrawFn) -> tuple[float, bool]:
    """When, and whether it is refused."""
    return draw(st.floats(0, 0.8)), draw(st.integers(0, 3)) == 0


@every_loop
def test_updates_at_any_moment_lose_nobody_and_no_token_is_computed_from_kv_of_older_weights(loop):
    retracted = []

    @thorough(60)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs(most=10, prompts_alone=False))
        config = data.draw(some_settings(loop))
        updates = data.draw(st.lists(an_update(), min_size=1, max_size=5))
        told: list[str | None] = []
        written: list[int] = []
        run: list[Run] = []

        def message(refused: bool) -> UpdateWeights:
            weights = Weights("refused" if refused else None)
            return UpdateWeights(weights.check, lambda: written.append(len(run[0].batches) if run else 0), told.append)

        messages: list[tuple[float, object]] = [(at_s, message(refused)) for at_s, refused in updates]
        paused_s = data.draw(st.floats(0, 0.6))
        if data.draw(st.booleans()):
            messages += [(paused_s, Pause()), (paused_s + 0.1, Resume())]
        skip = loop != "pipeline" and data.draw(st.integers(0, 3)) == 0
        after = simulate(
            jobs, loop, messages=messages, skip=skip, on_step=lambda seen, now_s: run.append(seen), **config
        )
        assert sorted(told, key=str) == sorted((("refused" if no else None) for _, no in updates), key=str)
        if skip:  # skipped steps have neither batches nor tokens that could be looked at
            assert sorted(after.ended) == sorted(job.rid for job in jobs)
            check_the_pools(after)
            return
        check_the_end(jobs, after)
        check_versions(after, written, int(config["page_size"]))
        retracted.append(sum(req.retractions for req in after.ended.values()))

    holds()
    assert sum(count > 0 for count in retracted) > 12, "too few examples have an update in their middle"


def check_versions(run: Run, written: list[int], page_size: int) -> None:
    """Follow every batch through a page table and a KV pool of our own: what a token attends to, the weights of now have
    computed. ``written``: how many batches had been formed when weights were written."""
    table = run.scheduler.kv.table
    pages = np.full((table.rows, table.page_width), -1)
    version_of = np.full((run.scheduler.config.pages, page_size), -1)
    for number, batch in enumerate(run.batches):
        version = sum(count <= number for count in written)
        worker = batch.worker
        decodes = slice(worker.num_prefill, None)
        for write in worker.page_writes:
            pages[write.row, write.first_page : write.first_page + len(write.pages)] = write.pages
        if worker.decode_page_rows is not None:
            length = dict(zip(worker.rows[decodes].tolist(), worker.seq_lens[decodes].tolist(), strict=True))
            for row, page in zip(worker.decode_page_rows.tolist(), worker.decode_pages.tolist(), strict=True):
                pages[row, (length[row] - 1) // page_size] = page
        for row, end, count in zip(
            *(a.tolist() for a in (worker.rows, worker.seq_lens, worker.query_lens)), strict=True
        ):
            at = np.arange(end)
            slots = pages[row, at // page_size] * page_size + at % page_size
            flat = version_of.reshape(-1)
            assert (flat[slots[: end - count]] == version).all(), f"batch {number} reads KV of older weights"
            flat[slots[end - count :]] = version
