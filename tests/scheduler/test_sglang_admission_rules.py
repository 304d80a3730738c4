"""Rules of admission that SGLang has and this project's defaults have not, one at a time: what is charged, who waits, who
joins, who goes first."""

from __future__ import annotations

import pytest

from tests.scheduler.by_hand import cached, extends, finish_all, form, generate, next_rids, rids, serve, step, words
from tests.scheduler.by_hand import eager as scheduler
from workbench.scheduler.messages import UpdateWeights

# -- admission -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("charge", "first"), [("tokens", [16, 16]), ("pages", [16])])
def test_charged_in_pages_a_request_costs_a_page_more(charge, first):
    s = scheduler(kv_tokens=64, page_size=16, charge=charge)
    s.receive([generate("a", words(0, 16), 1), generate("b", words(100, 16), 1)])
    assert extends(step(s)) == first


@pytest.mark.parametrize(("charge", "first"), [("tokens", [17, 15]), ("pages", [17])])
def test_charged_in_pages_a_prompt_takes_whole_pages_of_the_chunk(charge, first):
    s = scheduler(page_size=16, chunk=32, charge=charge)
    s.receive([generate("a", words(0, 17), 1), generate("b", words(100, 15), 1)])
    assert extends(step(s)) == first


def test_charged_in_pages_an_output_is_bounded_so_that_it_can_be_let_in():
    s = scheduler(kv_tokens=64, page_size=16, charge="pages")
    s.receive([generate("a", words(0, 20), 60)])
    assert len(finish_all(s)) == 64 - 32 - 16 - 1


def test_charged_in_pages_the_prompt_budget_puts_nobody_off_while_any_is_left():
    messages = [generate("a", words(0, 30), 1), generate("b", words(100, 30), 1), generate("c", words(200, 30), 1)]
    firsts = {}
    for charge in ("tokens", "pages"):
        s = scheduler(max_prefill_tokens=50, chunk=500, charge=charge)
        s.receive(messages)
        firsts[charge] = rids(step(s))
    assert firsts == {"tokens": ["a"], "pages": ["a", "b"]}


@pytest.mark.parametrize(("whole", "second"), [(False, ["b"]), (True, ["a"])])
def test_who_ignores_eos_may_be_expected_to_write_all_it_may(whole, second):
    s = scheduler(kv_tokens=100, conservativeness=0.1, reserve_ignore_eos=whole)
    s.receive([generate("a", words(0, 10), 60, ignore_eos=True)])
    step(s)
    s.receive([generate("b", words(100, 30), 5)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("rounds", "second"), [(True, ["a"]), (False, ["b"])])
def test_what_is_expected_of_running_requests_may_stay_a_fraction(rounds, second):
    s = scheduler(kv_tokens=100, charge="pages", round_reserve=rounds)
    s.receive([generate("a", words(0, 10), 6)])
    step(s)  # it may write 5 more, of which 3.5 are expected: 86.5 of 100 are left
    s.receive([generate("b", words(100, 79), 6)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("counted", "second"), [("launch", ["b"]), ("result", ["a"])])
def test_a_token_in_flight_may_still_be_to_come(counted, second):
    s = scheduler(kv_tokens=100, conservativeness=10, outputs_counted=counted)
    s.receive([generate("a", words(0, 10), 6)])
    form(s)
    s.receive([generate("b", words(100, 80), 4)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("counted", "second"), [("launch", ["b"]), ("result", None)])
def test_who_ends_in_flight_may_still_be_counted(counted, second):
    s = scheduler(kv_tokens=100, conservativeness=10, outputs_counted=counted)
    s.receive([generate("a", words(0, 10), 1)])
    form(s)
    s.receive([generate("b", words(100, 80), 9)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("when", "third"), [("refused", ["b"]), ("exhausted", ["x", "a"])])
def test_an_admission_that_leaves_nothing_may_close_the_queue(when, third):
    s = scheduler(kv_tokens=128, page_size=16, charge="pages", full_when=when)
    s.receive([generate("x", words(0, 1), 3)])
    step(s)
    s.receive([generate("a", words(50, 1), 80)])
    assert rids(step(s)) == ["a"]
    s.receive([generate("b", words(60, 1), 1)])
    assert next_rids(s) == third


@pytest.mark.parametrize("when", ["refused", "exhausted"])
def test_where_nobody_runs_the_queue_is_not_closed(when):
    s = scheduler(kv_tokens=128, page_size=16, charge="pages", full_when=when)
    s.receive([generate("a", words(50, 1), 96)])
    assert rids(step(s)) == ["a"]  # which leaves nothing
    s.receive([generate("b", words(60, 1), 1)])
    assert next_rids(s) == ["b"]


@pytest.mark.parametrize(("beside", "first"), [(True, [16]), (False, [16, 16])])
def test_the_page_beside_its_own_may_not_be_asked_of_who_is_let_in(beside, first):
    s = scheduler(kv_tokens=64, page_size=16, charge="pages", page_beside=beside)
    s.receive([generate("a", words(0, 16), 1), generate("b", words(100, 16), 1)])
    assert extends(step(s)) == first


@pytest.mark.parametrize(("budget", "first"), [("spent", ["a", "b"]), ("whole", ["a"])])
def test_a_prompt_that_is_longer_than_the_prompt_budget_left_may_have_to_wait(budget, first):
    s = scheduler(max_prefill_tokens=50, chunk=500, charge="pages", prompt_budget=budget)
    s.receive([generate("a", words(0, 30), 1), generate("b", words(100, 30), 1)])
    assert rids(step(s)) == first


@pytest.mark.parametrize("looks", [False, True])
def test_beside_a_prompt_in_part_that_takes_all_the_next_may_be_looked_up(looks):
    s = scheduler(chunk=16, charge="pages", full_when="exhausted", look_when_spent=looks)
    serve(s, generate("f", words(0, 10), 1), generate("g", words(100, 10), 1))
    s.receive([generate("a", words(200, 60), 1)])
    step(s)
    s.receive([generate("w", words(0, 12), 1)])
    assert rids(step(s)) == ["a"]
    s.kv.cache.evict(1)
    assert cached(s, words(0, 10)) == (10 if looks else 0)


@pytest.mark.parametrize("rows_first", [True, False])
def test_the_queue_may_be_looked_through_although_no_place_is_free(rows_first):
    s = scheduler(policy="lpm", look_touches=True, max_running=1, full_when="exhausted", rows_first=rows_first)
    serve(s, generate("f", words(0, 20), 1), generate("g", words(100, 20), 1))
    s.receive([generate("r", words(200, 5), 5)])
    step(s)
    s.receive([generate("w", words(0, 30), 1)])
    assert next_rids(s) == ["r"]
    s.kv.cache.evict(1)
    assert cached(s, words(0, 20)) == (0 if rows_first else 20)


@pytest.mark.parametrize(("leaves", "order"), [("ended", [["b"], ["c", "b"]]), ("decode", [["c"], ["b"]])])
def test_who_has_ended_may_take_its_place_until_the_next_decode(leaves, order):
    s = scheduler(max_running=2, leaves=leaves)
    s.receive([generate("a", words(0, 5), 2), generate("c", words(50, 5), 9), generate("b", words(100, 5), 9)])
    assert [rids(step(s)) for _ in range(2)] == [["a", "c"], ["a", "c"]]
    assert [rids(step(s)) for _ in range(2)] == order


# -- the queue -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "order"), [("arrival", "abc"), ("back", "cab"), ("front", "bac")])
def test_who_loses_its_kv_waits_where_the_rule_says(rule, order):
    s = scheduler(max_running=2, requeue=rule)
    s.receive([generate("a", words(0, 10), 9), generate("b", words(100, 10), 9), generate("c", words(200, 10), 9)])
    assert rids(step(s)) == ["a", "b"]
    s.receive([UpdateWeights(lambda: None, lambda: None, lambda fault: None)])
    s.next_batch()
    assert "".join(sorted(s.lifecycle.by_id)) == "abc"
    admitted = [req.rid for req in s.slots[0].running.reqs]
    assert admitted == list(order[:2])


@pytest.mark.parametrize("policy_order", ["arrival", "policy"])
def test_a_queue_may_keep_the_order_that_its_policy_gave_it(policy_order):
    s = scheduler(policy="lof", max_running=1, queue_order=policy_order)
    s.receive([generate("r", words(0, 5), 3)])
    step(s)
    s.receive([generate("a", words(100, 5), 2), generate("b", words(200, 5), 9)])
    form(s)
    assert [req.rid for req in s.queue.waiting] == (["a", "b"] if policy_order == "arrival" else ["b", "a"])


@pytest.mark.parametrize(("least", "order"), [(None, ["a", "b", "c"]), (32, ["a", "c", "b"])])
def test_under_lpm_who_shares_with_one_before_it_may_go_last(least, order):
    s = scheduler(policy="lpm", defer_shared_tokens=least)
    shared = words(0, 40)
    s.receive([generate("a", [*shared, 900], 1), generate("b", [*shared, 901], 1), generate("c", words(500, 20), 1)])
    assert rids(step(s)) == order


@pytest.mark.parametrize("touches", [False, True])
def test_under_lpm_to_look_a_prompt_up_may_be_to_use_it(touches):
    s = scheduler(policy="lpm", max_running=1, look_touches=touches)
    serve(s, generate("f", words(0, 20), 1), generate("g", words(100, 20), 1))
    s.receive([generate("r", words(200, 5), 5)])
    step(s)
    s.receive([generate("w", words(0, 30), 1)])
    form(s)
    s.kv.cache.evict(1)
    assert cached(s, words(0, 20)) == (20 if touches else 0)


# -- mixed prefills and priorities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("join", "order"), [("before", ["a", "b"]), ("after", ["b", "a"])])
def test_where_decodes_join_last_they_run_behind_the_prompts_from_then_on(join, order):
    s = scheduler(mixed_chunk=True, chunk=512, mixed_join=join)
    s.receive([generate("a", words(0, 10), 9)])
    step(s)
    s.receive([generate("b", words(100, 10), 9)])
    batch = step(s)
    assert rids(batch) == ["b", "a"] and batch.worker.mode == "mixed"
    assert rids(step(s)) == order


def test_decodes_that_join_last_sit_out_where_the_prompts_have_left_no_page():
    s = scheduler(kv_tokens=80, page_size=16, mixed_chunk=True, chunk=512, conservativeness=0.01, mixed_join="after")
    s.receive([generate("a", words(0, 16), 2), generate("b", words(100, 16), 2)])
    assert rids(step(s)) == ["a", "b"]  # their pages are full
    s.receive([generate("c", words(200, 17), 2)])
    assert rids(step(s)) == ["c"]


def test_a_place_is_taken_from_the_newest_of_the_lowest_priority_and_only_where_none_is_free():
    for preempt_for in ("request", "place"):
        s = scheduler(
            policy="priority", preempt_threshold=1, max_running=2, preempt_for=preempt_for, full_when="exhausted"
        )
        s.receive([generate("a", words(0, 10), 20), generate("b", words(100, 10), 20)])
        step(s)
        s.receive([generate("c", words(200, 10), 3, priority=1)])
        batch = step(s)
        assert rids(batch) == ["c"] and [req.rid for req in batch.retracted] == ["b"]


def test_for_want_of_kv_nobody_loses_its_place():
    first = {}
    for preempt_for in ("request", "place"):
        s = scheduler(
            kv_tokens=60, policy="priority", preempt_threshold=1, preempt_for=preempt_for, full_when="exhausted"
        )
        s.receive([generate("a", words(0, 40), 10)])
        step(s)
        s.receive([generate("c", words(200, 30), 3, priority=1)])
        first[preempt_for] = rids(step(s))
    assert first == {"request": ["c"], "place": ["a"]}
