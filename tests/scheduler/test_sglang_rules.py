"""Rules of admission, eviction and retraction that SGLang has and this project's defaults have not, one at a time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.by_hand import EOS, extends, finish_all, form, process, rids, step, words
from tests.scheduler.by_hand import scheduler as some_scheduler
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.messages import Abort, Generate, UpdateWeights
from workbench.scheduler.request import SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler

TOKEN = 7
"""What :func:`process` samples for everybody."""


def scheduler(**settings: object) -> Scheduler:
    return some_scheduler(**{"share_in_batch_tokens": None, **settings})


def asked(rid: str, prompt: list[int], new: int, *, ignore_eos: bool = False, **more: object) -> Generate:
    return Generate(rid, np.array(prompt, np.int32), SamplingParams(new, ignore_eos=ignore_eos), **more)  # type: ignore[arg-type]


def next_rids(s: Scheduler) -> list[str] | None:
    """Who is in the next batch, which is left in flight; None where there is none."""
    batch = s.next_batch()
    s.check()
    return None if batch is None else rids(batch)


def cached(s: Scheduler, prompt: list[int]) -> int:
    """Tokens of a prompt that the prefix cache has."""
    tree = s.kv.cache.tree  # type: ignore[attr-defined]
    return int(tree.match(np.array(prompt, np.int32), touch=False)[1])


def serve(s: Scheduler, *messages: Generate) -> None:
    """Let requests come and go, one after the other."""
    for message in messages:
        s.receive([message])
        finish_all(s)


# -- admission -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("charge", "first"), [("tokens", [16, 16]), ("pages", [16])])
def test_charged_in_pages_a_request_costs_a_page_more(charge, first):
    s = scheduler(kv_tokens=64, page_size=16, charge=charge)
    s.receive([asked("a", words(0, 16), 1), asked("b", words(100, 16), 1)])
    assert extends(step(s)) == first


@pytest.mark.parametrize(("charge", "first"), [("tokens", [17, 15]), ("pages", [17])])
def test_charged_in_pages_a_prompt_takes_whole_pages_of_the_chunk(charge, first):
    s = scheduler(page_size=16, chunk=32, charge=charge)
    s.receive([asked("a", words(0, 17), 1), asked("b", words(100, 15), 1)])
    assert extends(step(s)) == first


def test_charged_in_pages_an_output_is_bounded_so_that_it_can_be_let_in():
    s = scheduler(kv_tokens=64, page_size=16, charge="pages")
    s.receive([asked("a", words(0, 20), 60)])
    assert len(finish_all(s)) == 64 - 32 - 16 - 1


def test_charged_in_pages_the_prompt_budget_puts_nobody_off_while_any_is_left():
    messages = [asked("a", words(0, 30), 1), asked("b", words(100, 30), 1), asked("c", words(200, 30), 1)]
    firsts = {}
    for charge in ("tokens", "pages"):
        s = scheduler(max_prefill_tokens=50, chunk=500, charge=charge)
        s.receive(messages)
        firsts[charge] = rids(step(s))
    assert firsts == {"tokens": ["a"], "pages": ["a", "b"]}


@pytest.mark.parametrize(("whole", "second"), [(False, ["b"]), (True, ["a"])])
def test_who_ignores_eos_may_be_expected_to_write_all_it_may(whole, second):
    s = scheduler(kv_tokens=100, conservativeness=0.1, reserve_ignore_eos=whole)
    s.receive([asked("a", words(0, 10), 60, ignore_eos=True)])
    step(s)
    s.receive([asked("b", words(100, 30), 5)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("rounds", "second"), [(True, ["a"]), (False, ["b"])])
def test_what_is_expected_of_running_requests_may_stay_a_fraction(rounds, second):
    s = scheduler(kv_tokens=100, charge="pages", round_reserve=rounds)
    s.receive([asked("a", words(0, 10), 6)])
    step(s)  # it may write 5 more, of which 3.5 are expected: 86.5 of 100 are left
    s.receive([asked("b", words(100, 79), 6)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("counted", "second"), [("launch", ["b"]), ("result", ["a"])])
def test_a_token_in_flight_may_still_be_to_come(counted, second):
    s = scheduler(kv_tokens=100, conservativeness=10, outputs_counted=counted)
    s.receive([asked("a", words(0, 10), 6)])
    form(s)
    s.receive([asked("b", words(100, 80), 4)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("counted", "second"), [("launch", ["b"]), ("result", None)])
def test_who_ends_in_flight_may_still_be_counted(counted, second):
    s = scheduler(kv_tokens=100, conservativeness=10, outputs_counted=counted)
    s.receive([asked("a", words(0, 10), 1)])
    form(s)
    s.receive([asked("b", words(100, 80), 9)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("when", "third"), [("refused", ["b"]), ("exhausted", ["x", "a"])])
def test_an_admission_that_leaves_nothing_may_close_the_queue(when, third):
    s = scheduler(kv_tokens=128, page_size=16, charge="pages", full_when=when)
    s.receive([asked("x", words(0, 1), 3)])
    step(s)
    s.receive([asked("a", words(50, 1), 80)])
    assert rids(step(s)) == ["a"]
    s.receive([asked("b", words(60, 1), 1)])
    assert next_rids(s) == third


@pytest.mark.parametrize("when", ["refused", "exhausted"])
def test_where_nobody_runs_the_queue_is_not_closed(when):
    s = scheduler(kv_tokens=128, page_size=16, charge="pages", full_when=when)
    s.receive([asked("a", words(50, 1), 96)])
    assert rids(step(s)) == ["a"]  # which leaves nothing
    s.receive([asked("b", words(60, 1), 1)])
    assert next_rids(s) == ["b"]


@pytest.mark.parametrize(("beside", "first"), [(True, [16]), (False, [16, 16])])
def test_the_page_beside_its_own_may_not_be_asked_of_who_is_let_in(beside, first):
    s = scheduler(kv_tokens=64, page_size=16, charge="pages", page_beside=beside)
    s.receive([asked("a", words(0, 16), 1), asked("b", words(100, 16), 1)])
    assert extends(step(s)) == first


@pytest.mark.parametrize(("budget", "first"), [("spent", ["a", "b"]), ("whole", ["a"])])
def test_a_prompt_that_is_longer_than_the_prompt_budget_left_may_have_to_wait(budget, first):
    s = scheduler(max_prefill_tokens=50, chunk=500, charge="pages", prompt_budget=budget)
    s.receive([asked("a", words(0, 30), 1), asked("b", words(100, 30), 1)])
    assert rids(step(s)) == first


@pytest.mark.parametrize("looks", [False, True])
def test_beside_a_prompt_in_part_that_takes_all_the_next_may_be_looked_up(looks):
    s = scheduler(chunk=16, charge="pages", full_when="exhausted", look_when_spent=looks)
    serve(s, asked("f", words(0, 10), 1), asked("g", words(100, 10), 1))
    s.receive([asked("a", words(200, 60), 1)])
    step(s)
    s.receive([asked("w", words(0, 12), 1)])
    assert rids(step(s)) == ["a"]
    s.kv.cache.evict(1)
    assert cached(s, words(0, 10)) == (10 if looks else 0)


@pytest.mark.parametrize("rows_first", [True, False])
def test_the_queue_may_be_looked_through_although_no_place_is_free(rows_first):
    s = scheduler(policy="lpm", look_touches=True, max_running=1, full_when="exhausted", rows_first=rows_first)
    serve(s, asked("f", words(0, 20), 1), asked("g", words(100, 20), 1))
    s.receive([asked("r", words(200, 5), 5)])
    step(s)
    s.receive([asked("w", words(0, 30), 1)])
    assert next_rids(s) == ["r"]
    s.kv.cache.evict(1)
    assert cached(s, words(0, 20)) == (0 if rows_first else 20)


@pytest.mark.parametrize(("leaves", "order"), [("ended", [["b"], ["c", "b"]]), ("decode", [["c"], ["b"]])])
def test_who_has_ended_may_take_its_place_until_the_next_decode(leaves, order):
    s = scheduler(max_running=2, leaves=leaves)
    s.receive([asked("a", words(0, 5), 2), asked("c", words(50, 5), 9), asked("b", words(100, 5), 9)])
    assert [rids(step(s)) for _ in range(2)] == [["a", "c"], ["a", "c"]]
    assert [rids(step(s)) for _ in range(2)] == order


# -- eviction and the prefix cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evict_for", "computed"), [("row", [25, 21]), ("batch", [25, 1])])
def test_eviction_for_a_whole_batch_spares_what_its_prompts_find(evict_for, computed):
    s = scheduler(kv_tokens=60, evict_for=evict_for)
    serve(s, asked("f", words(0, 20), 1), asked("g", words(100, 20), 1))
    s.receive([asked("a", words(200, 25), 1), asked("b", [*words(0, 20), 300], 1)])
    assert extends(step(s)) == computed


@pytest.mark.parametrize(("evict_for", "left"), [("row", 8), ("batch", 8), ("batch-ahead", 0)])
def test_a_decode_may_evict_for_pages_that_it_does_not_start(evict_for, left):
    s = scheduler(kv_tokens=20, page_size=4, evict_for=evict_for)
    serve(s, asked("f", words(0, 8), 1))
    s.receive([asked("a", words(100, 5), 8)])
    while s.kv.pool.free:
        step(s)
    assert cached(s, words(0, 8)) == 8
    form(s)
    assert cached(s, words(0, 8)) == left


@pytest.mark.parametrize(("amount", "left"), [("missing", (0, 5)), ("all", (0, 0))])
def test_as_much_may_be_evicted_as_is_wanted_and_not_as_is_missing(amount, left):
    s = scheduler(kv_tokens=20, evict_amount=amount)
    serve(s, asked("f", words(0, 5), 1), asked("g", words(100, 5), 1))
    s.receive([asked("a", words(200, 12), 1)])
    step(s)
    assert (cached(s, words(0, 5)), cached(s, words(100, 5))) == left


@pytest.mark.parametrize(("share", "computed"), [("launch", [1]), ("result", [21])])
def test_a_prompt_may_be_shared_only_when_its_result_comes(share, computed):
    s = scheduler(share_prompts=share)
    s.receive([asked("a", words(0, 20), 5)])
    in_flight = form(s)
    s.receive([asked("b", [*words(0, 20), 300], 1)])
    assert extends(form(s)) == computed
    process(s, in_flight)
    assert cached(s, words(0, 20)) == 20


def test_a_prompt_in_part_is_shared_with_the_next_choice_either_way():
    s = scheduler(chunk=16, share_prompts="result")
    s.receive([asked("a", words(0, 40), 5)])
    form(s)
    form(s)
    assert cached(s, words(0, 40)) == 16


def test_shared_with_its_result_a_prompt_is_all_that_is_shared_though_it_decodes_already():
    s = scheduler(share_prompts="result")
    s.receive([asked("a", words(0, 20), 2)])
    prefill, decode = form(s), form(s)
    process(s, prefill)
    assert cached(s, [*words(0, 20), TOKEN]) == 20
    process(s, decode)
    assert cached(s, [*words(0, 20), TOKEN]) == 21


@pytest.mark.parametrize("touches", [False, True])
def test_what_the_cache_knows_may_count_as_used_when_it_is_put_in_again(touches):
    s = scheduler(page_size=4, touch_known=touches)
    serve(s, asked("f", words(0, 5), 1), asked("g", words(100, 5), 1))
    s.receive([asked("h", words(0, 5), 2)])
    step(s)
    s.receive([asked("i", words(100, 5), 1)])
    finish_all(s)  # i comes and goes before h, which adds nothing to its page
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 4)), cached(s, words(100, 4))) == ((4, 0) if touches else (0, 4))


@pytest.mark.parametrize("splits", [False, True])
def test_an_output_may_be_evicted_without_its_prompt(splits):
    s = scheduler(split_at_prompt=splits)
    s.receive([asked("a", words(0, 10), 4)])
    step(s)
    step(s)
    s.receive(
        [UpdateWeights(lambda: None, lambda: None, lambda fault: None)]
    )  # its KV is lost, its output is prompt now
    finish_all(s)
    s.kv.cache.evict(1)
    s.kv.cache.evict(1)
    assert cached(s, words(0, 10)) == (10 if splits else 0)


@pytest.mark.parametrize("refresh", [None, 1])
def test_what_waiting_requests_find_in_the_cache_may_be_kept_for_them(refresh):
    s = scheduler(max_running=1, refresh_waiting=refresh)
    serve(s, asked("f", words(0, 20), 1), asked("g", words(100, 20), 1))
    s.receive([asked("r", words(200, 5), 5)])
    step(s)
    s.receive([asked("w", words(0, 30), 1)])
    assert next_rids(s) == ["r"]
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 20)), cached(s, words(100, 20))) == ((0, 20) if refresh is None else (20, 0))


# -- the queue -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "order"), [("arrival", "abc"), ("back", "cab"), ("front", "bac")])
def test_who_loses_its_kv_waits_where_the_rule_says(rule, order):
    s = scheduler(max_running=2, requeue=rule)
    s.receive([asked("a", words(0, 10), 9), asked("b", words(100, 10), 9), asked("c", words(200, 10), 9)])
    assert rids(step(s)) == ["a", "b"]
    s.receive([UpdateWeights(lambda: None, lambda: None, lambda fault: None)])
    s.next_batch()
    assert "".join(sorted(s.lifecycle.by_id)) == "abc"
    admitted = [req.rid for req in s.slots[0].running.reqs]
    assert admitted == list(order[:2])


@pytest.mark.parametrize("policy_order", ["arrival", "policy"])
def test_a_queue_may_keep_the_order_that_its_policy_gave_it(policy_order):
    s = scheduler(policy="lof", max_running=1, queue_order=policy_order)
    s.receive([asked("r", words(0, 5), 3)])
    step(s)
    s.receive([asked("a", words(100, 5), 2), asked("b", words(200, 5), 9)])
    form(s)
    assert [req.rid for req in s.queue.waiting] == (["a", "b"] if policy_order == "arrival" else ["b", "a"])


@pytest.mark.parametrize(("least", "order"), [(None, ["a", "b", "c"]), (32, ["a", "c", "b"])])
def test_under_lpm_who_shares_with_one_before_it_may_go_last(least, order):
    s = scheduler(policy="lpm", defer_shared_tokens=least)
    shared = words(0, 40)
    s.receive([asked("a", [*shared, 900], 1), asked("b", [*shared, 901], 1), asked("c", words(500, 20), 1)])
    assert rids(step(s)) == order


@pytest.mark.parametrize("touches", [False, True])
def test_under_lpm_to_look_a_prompt_up_may_be_to_use_it(touches):
    s = scheduler(policy="lpm", max_running=1, look_touches=touches)
    serve(s, asked("f", words(0, 20), 1), asked("g", words(100, 20), 1))
    s.receive([asked("r", words(200, 5), 5)])
    step(s)
    s.receive([asked("w", words(0, 30), 1)])
    form(s)
    s.kv.cache.evict(1)
    assert cached(s, words(0, 20)) == (20 if touches else 0)


# -- retraction ------------------------------------------------------------------------------------------------------------


def crowded(*, cached_token: bool = False, **settings: object) -> Scheduler:
    """Two requests alike that decode, with room for five more tokens of each, and for one that the cache has."""
    s = scheduler(kv_tokens=31, conservativeness=0.01, **settings)
    if cached_token:
        serve(s, asked("f", [3], 1))
    for rid, start in (("a", 10), ("b", 100)):
        s.receive([asked(rid, words(start, 10), 9)])
        assert rids(step(s)) == [rid]
    return s


def retraction(s: Scheduler) -> tuple[ScheduleBatch, ScheduleBatch]:
    """Go on with a batch in flight until somebody is retracted: the batch in flight by then, and the one after."""
    batch = form(s)
    while not (after := form(s)).retracted:
        process(s, batch)
        batch = after
    return batch, after


@pytest.mark.parametrize(("ties", "stays"), [("first", ["b"]), ("last", ["a"])])
def test_of_equals_the_first_or_the_last_in_the_batch_is_retracted(ties, stays):
    assert rids(retraction(crowded(retract_ties=ties))[1]) == stays


@pytest.mark.parametrize(("rule", "more"), [("keep", 1), ("lose", 0)])
def test_a_token_in_flight_of_who_is_retracted_may_be_lost_and_is_computed_again(rule, more):
    s = crowded(in_flight_token=rule)
    in_flight, after = retraction(s)
    (lost,) = after.retracted
    known = len(lost.tokens)
    process(s, in_flight)
    assert len(lost.tokens) == known + more
    outputs = {req.rid: req.output_len for req in process(s, after).ended}
    while not s.idle:
        batch = s.next_batch()
        if batch is not None:
            outputs |= {req.rid: req.output_len for req in process(s, batch).ended}
    assert outputs == {"a": 9, "b": 9}


@pytest.mark.parametrize(("ahead", "left"), [(None, 1), (20, 0)])
def test_before_a_retraction_everything_may_be_evicted(ahead, left):
    s = crowded(cached_token=True, retract_ahead=ahead)
    retraction(s)
    assert cached(s, [3]) == left


@pytest.mark.parametrize("retracts", [True, False])
def test_a_step_may_be_passed_over_while_somebody_is_about_to_end(retracts):
    s = scheduler(kv_tokens=36, conservativeness=0.01, retract_while_ending=retracts)
    for message in (asked("a", words(0, 10), 6), asked("b", words(100, 10), 8), asked("c", [900], 8)):
        s.receive([message])
        step(s)
    for _ in range(4):
        step(s)
    in_flight = form(s)  # a ends with it, and two more tokens are wanted where there are none
    assert next_rids(s) == (["c"] if retracts else None)
    if not retracts:
        process(s, in_flight)
        assert next_rids(s) == ["b", "c"]


# -- the end ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["now", "result"])
def test_an_abort_may_end_a_running_request_with_its_next_result(when):
    s = scheduler(abort_running=when)
    s.receive([asked("a", words(0, 10), 9), asked("b", words(100, 10), 9)])
    step(s)
    s.receive([Abort("a")])
    batch = form(s)
    assert rids(batch) == (["b"] if when == "now" else ["a", "b"])
    ended = [*process(s, batch).ended]
    if when == "result":
        assert [(req.rid, req.finish.status, req.output_len) for req in ended] == [("a", "aborted:client", 2)]
    assert next_rids(s) == ["b"]


def test_an_abort_with_the_next_result_ends_who_waits_at_once():
    s = scheduler(abort_running="result", max_running=1)
    s.receive([asked("a", words(0, 10), 9), asked("b", words(100, 10), 9)])
    step(s)
    s.receive([Abort("b")])
    assert [req.rid for req in s.take_ended()] == ["b"]


@pytest.mark.parametrize(("when", "batches"), [("now", [[16]]), ("result", [[16], [16], [8]])])
def test_an_abort_may_let_a_prompt_in_part_be_computed_to_its_end(when, batches):
    s = scheduler(chunk=16, abort_running="result", abort_partial=when)
    s.receive([asked("a", words(0, 40), 9)])
    first = extends(step(s))
    s.receive([Abort("a")])
    assert [first, *map(extends, finish_all(s))] == batches


@pytest.mark.parametrize(("known", "batches"), [("launch", 3), ("result", 4)])
def test_who_ends_by_length_may_be_in_one_more_batch_for_nothing(known, batches):
    s = scheduler(stops_known=known)
    s.receive([asked("a", words(0, 10), 3)])
    in_flight, formed, ended = form(s), 1, []
    while in_flight is not None:
        after = s.next_batch()
        formed += after is not None
        ended += process(s, in_flight).ended
        in_flight = after
    assert formed == batches and [(req.finish.status, req.output_len) for req in ended] == [("finished", 3)]
    s.rest()
    assert cached(s, [*words(0, 10), TOKEN, TOKEN, TOKEN]) == 12


@pytest.mark.parametrize(("kept", "tokens"), [("keep", 32), ("drop", 16)])
def test_what_an_aborted_prompt_has_computed_may_be_dropped(kept, tokens):
    s = scheduler(chunk=16, aborted_kv=kept)
    s.receive([asked("a", words(0, 60), 9)])
    step(s)
    step(s)  # the first chunk is in the cache by now, the second is not
    s.receive([Abort("a")])
    assert cached(s, words(0, 60)) == tokens


@pytest.mark.parametrize(("rule", "held"), [("landed", 12), ("ended", 0)])
def test_who_has_ended_may_give_its_kv_back_while_a_batch_in_flight_has_it(rule, held):
    s = scheduler(give_back=rule)
    s.receive([asked("a", words(0, 10), 9)])
    step(s)
    stopping, after = form(s), form(s)
    s.process(stopping, StepOutput(np.array([EOS], np.int32)))
    assert s.kv.used_tokens == held
    s.check()
    process(s, after)
    assert s.kv.used_tokens == 0
    s.rest()


# -- mixed prefills and priorities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("join", "order"), [("before", ["a", "b"]), ("after", ["b", "a"])])
def test_where_decodes_join_last_they_run_behind_the_prompts_from_then_on(join, order):
    s = scheduler(mixed_chunk=True, chunk=512, mixed_join=join)
    s.receive([asked("a", words(0, 10), 9)])
    step(s)
    s.receive([asked("b", words(100, 10), 9)])
    batch = step(s)
    assert rids(batch) == ["b", "a"] and batch.worker.mode == "mixed"
    assert rids(step(s)) == order


def test_decodes_that_join_last_sit_out_where_the_prompts_have_left_no_page():
    s = scheduler(kv_tokens=80, page_size=16, mixed_chunk=True, chunk=512, conservativeness=0.01, mixed_join="after")
    s.receive([asked("a", words(0, 16), 2), asked("b", words(100, 16), 2)])
    assert rids(step(s)) == ["a", "b"]  # their pages are full
    s.receive([asked("c", words(200, 17), 2)])
    assert rids(step(s)) == ["c"]


def test_a_place_is_taken_from_the_newest_of_the_lowest_priority_and_only_where_none_is_free():
    for preempt_for in ("request", "place"):
        s = scheduler(
            policy="priority", preempt_threshold=1, max_running=2, preempt_for=preempt_for, full_when="exhausted"
        )
        s.receive([asked("a", words(0, 10), 20), asked("b", words(100, 10), 20)])
        step(s)
        s.receive([asked("c", words(200, 10), 3, priority=1)])
        batch = step(s)
        assert rids(batch) == ["c"] and [req.rid for req in batch.retracted] == ["b"]


def test_for_want_of_kv_nobody_loses_its_place():
    first = {}
    for preempt_for in ("request", "place"):
        s = scheduler(
            kv_tokens=60, policy="priority", preempt_threshold=1, preempt_for=preempt_for, full_when="exhausted"
        )
        s.receive([asked("a", words(0, 40), 10)])
        step(s)
        s.receive([asked("c", words(200, 30), 3, priority=1)])
        first[preempt_for] = rids(step(s))
    assert first == {"request": ["c"], "place": ["a"]}
