"""Rules that mini-sglang has and our defaults have not, one at a time: what is set aside, cut, shared, given back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.by_hand import (
    EOS,
    TOKEN,
    cached,
    extends,
    finish_all,
    form,
    generate,
    next_rids,
    process,
    rids,
    serve,
    step,
    words,
)
from tests.scheduler.by_hand import eager as scheduler
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.config import ConfigError
from workbench.scheduler.messages import Abort, Generate, OpenSession
from workbench.scheduler.rules import EngineRules
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler
from workbench.scheduler.settings import settings_of
from workbench.settings.loading import settings_from

PRESET = settings_from(None, {"engine": "mini-sglang-20fcd7f"})
ALL = {name: getattr(PRESET, name) for name in settings_of(EngineRules)}
"""Its rules together."""


# -- what is set aside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reserve", "second"), [("estimate", ["b"]), ("full", ["a"]), ("none", ["b"])])
def test_of_running_requests_the_expected_output_is_set_aside_or_all_of_it_or_none(reserve, second):
    s = scheduler(kv_tokens=100, reserve=reserve)
    s.receive([generate("a", words(0, 10), 60)])
    step(s)
    s.receive([generate("b", words(100, 30), 5)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("reserve", "first"), [("estimate", ["a", "b"]), ("full", ["a"])])
def test_a_whole_output_has_no_limit_beyond_which_nobody_is_expected_to_write(reserve, first):
    s = scheduler(kv_tokens=10_000, max_context=9000, reserve=reserve)
    s.receive([generate("a", words(0, 10), 6000), generate("b", words(100, 10), 6000)])
    assert rids(step(s)) == first


@pytest.mark.parametrize(("reserve", "first"), [("full", ["a"]), ("none", ["a", "b"])])
def test_for_no_output_nothing_is_set_aside_in_the_batch_either(reserve, first):
    s = scheduler(kv_tokens=100, reserve=reserve)
    s.receive([generate("a", words(0, 40), 40), generate("b", words(100, 40), 40)])
    assert rids(step(s)) == first
    assert {req.finish.kind for batch in finish_all(s) for req in batch.reqs} == {"length"}


@pytest.mark.parametrize(("counted", "first"), [("waiting", [17]), ("running", [17, 17])])
def test_the_need_of_a_waiting_request_is_rounded_up_to_pages_or_is_not(counted, first):
    s = scheduler(kv_tokens=64, page_size=16, page_rest=counted)
    s.receive([generate("a", words(0, 17), 4), generate("b", words(100, 17), 4)])
    assert extends(step(s)) == first


@pytest.mark.parametrize(("counted", "second"), [("waiting", ["b"]), ("running", ["a"])])
def test_a_running_request_may_be_counted_with_the_rest_of_a_page(counted, second):
    s = scheduler(kv_tokens=96, page_size=16, reserve="full", page_rest=counted)
    s.receive([generate("a", words(0, 16), 8)])
    step(s)  # it may write 7 more, of 80 tokens that are left
    s.receive([generate("b", words(100, 16), 42)])
    assert next_rids(s) == second


@pytest.mark.parametrize(("margin", "first"), [(1, ["a"]), (0, ["a", "b"])])
def test_the_pool_may_be_filled_to_the_last_token(margin, first):
    s = scheduler(kv_tokens=60, kv_margin=margin)
    s.receive([generate("a", words(0, 20), 10), generate("b", words(100, 20), 10)])
    assert rids(step(s)) == first


def test_where_short_prompts_need_more_pages_than_tokens_nobody_fails():
    # mini-sglang's own allocation fails here: admission counts tokens, and these would be five pages of four.
    s = scheduler(kv_tokens=64, page_size=16, **ALL)
    s.receive([generate(f"r{i}", words(50 * i, 2), 8) for i in range(5)])
    assert extends(step(s)) == [2] * 4
    finish_all(s)
    s.receive([generate(f"s{i}", words(500 + 50 * i, 10), 11) for i in range(3)])
    batches = finish_all(s)
    assert sum(len(batch.retracted) for batch in batches) > 0, "each of them comes to two pages"
    assert {req.finish.kind for batch in batches for req in batch.reqs} == {"length"}


# -- chunks ----------------------------------------------------------------------------------------------------------------


def test_a_chunk_may_end_inside_a_page_and_the_next_goes_on_there():
    s = scheduler(page_size=16, chunk=25, chunk_cut="tokens")
    s.receive([generate("a", words(0, 40), 2), generate("b", words(100, 40), 2)])
    assert extends(step(s)) == [25]
    assert extends(step(s)) == [15, 10]
    assert cached(s, words(0, 40)) == 16, "whole pages alone are shared"
    assert [extends(step(s)), extends(step(s))] == [[25], [5]]
    finish_all(s)
    assert cached(s, [*words(0, 40), TOKEN]) == 32 and s.kv.cached_tokens == 64


def test_a_chunk_may_be_smaller_than_a_page_where_it_ends_inside_one():
    s = scheduler(page_size=16, chunk=3, chunk_cut="tokens")
    s.receive([generate("a", words(0, 20), 2)])
    assert [extends(step(s)) for _ in range(7)] == [[3]] * 6 + [[2]]
    with pytest.raises(ConfigError, match="chunk: 3 is smaller than a page of 16 tokens"):
        scheduler(page_size=16, chunk=3)


@pytest.mark.parametrize(("cut", "stays"), [("pages", (10, 0)), ("tokens", (0, 10))])
def test_where_nothing_is_left_of_the_chunk_nobodys_prefix_is_used(cut, stays):
    s = scheduler(chunk=10, chunk_cut=cut)
    serve(s, generate("x", words(0, 10), 1), generate("y", words(100, 10), 1))
    s.receive([generate("a", words(200, 10), 5), generate("b", [*words(0, 10), 1], 1)])
    assert rids(step(s)) == ["a"]
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 10)), cached(s, words(100, 10))) == stays


@pytest.mark.parametrize(("cut", "first"), [("pages", [30]), ("tokens", [30, 20])])
def test_a_prompt_beyond_the_budget_of_prompts_is_put_off_or_cut(cut, first):
    s = scheduler(max_prefill_tokens=50, chunk=500, chunk_cut=cut)
    s.receive([generate("a", words(0, 30), 1), generate("b", words(100, 30), 1)])
    assert extends(step(s)) == first


# -- who is looked at again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "third"), [("refused", ["a"]), ("never", ["b"])])
def test_who_was_refused_may_be_looked_at_again_though_nothing_was_given_back(when, third):
    s = scheduler(kv_tokens=100, reserve="full", share_prompts="result", full_when=when)
    s.receive([generate("a", words(0, 40), 20)])
    prompt = form(s)
    s.receive([generate("b", [*words(0, 40), 300], 5)])
    decode = form(s)
    assert rids(decode) == ["a"], "there is no room for 46 tokens more"
    process(s, prompt)
    process(s, decode)
    assert next_rids(s) == third, "of its prompt one token is left to compute by now"


# -- the prefix cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shares", "found"), [(True, 32), (False, 0)])
def test_what_is_computed_of_an_unfinished_prompt_may_stay_its_own(shares, found):
    s = scheduler(chunk=16, share_chunks=shares)
    s.receive([generate("a", words(0, 40), 2)])
    step(s)
    step(s)
    form(s)
    assert cached(s, words(0, 40)) == found
    assert next_rids(s) == ["a"]
    assert cached(s, words(0, 40)) == 40


@pytest.mark.parametrize(("launched", "found"), [(False, 10), (True, 11)])
def test_with_a_prompt_what_is_launched_of_its_output_may_be_shared(launched, found):
    s = scheduler(share_prompts="result", share_launched=launched)
    s.receive([generate("a", words(0, 10), 9)])
    prompt, _ = form(s), form(s)
    process(s, prompt)
    assert cached(s, [*words(0, 10), TOKEN]) == found
    finish_all_in_flight(s)


def test_with_a_prompt_nothing_more_is_shared_where_nothing_more_is_launched():
    s = scheduler(share_prompts="result", share_launched=True)
    s.receive([generate("a", words(0, 10), 9)])
    step(s)
    assert cached(s, [*words(0, 10), TOKEN]) == 10


@pytest.mark.parametrize(("touches", "stays"), [(True, (10, 0)), (False, (5, 10))])
def test_a_match_that_ends_inside_a_run_may_be_no_use_of_it(touches, stays):
    s = scheduler(touch_part=touches)
    serve(s, generate("x", words(0, 10), 1), generate("y", words(100, 10), 1))
    serve(s, generate("z", [*words(0, 5), *words(200, 5)], 1))
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 10)), cached(s, words(100, 10))) == stays


@pytest.mark.parametrize(("evict_for", "left"), [("batch", 16), ("batch-ahead", 0)])
def test_a_batch_may_evict_just_what_its_prompts_lack(evict_for, left):
    s = scheduler(kv_tokens=80, page_size=16, evict_for=evict_for)
    serve(s, generate("x", words(0, 16), 1))
    s.receive([generate("a", words(100, 31), 1), generate("b", words(200, 31), 1)])
    assert extends(step(s)) == [31, 31]
    assert cached(s, words(0, 16)) == left


# -- what is given back while a batch is in flight -------------------------------------------------------------------------


def finish_all_in_flight(s: Scheduler) -> None:
    while s.flights:
        process(s, s.flights[0])
    finish_all(s)


def two_in_flight(s: Scheduler, new: int, *more: Generate) -> tuple[ScheduleBatch, ScheduleBatch]:
    """A prompt of ten tokens and a decode of it, neither of them processed."""
    s.receive([generate("a", words(0, 10), new), *more])
    return form(s), form(s)


@pytest.mark.parametrize(("rule", "held"), [("landed", 11), ("ended", 11), ("at_once", 0)])
def test_who_ends_by_length_with_a_batch_in_flight_may_give_its_kv_back_before(rule, held):
    s = scheduler(give_back=rule)
    prompt, last = two_in_flight(s, 2)
    assert not process(s, prompt).ended
    assert s.kv.used_tokens == held
    (ended,) = process(s, last).ended
    assert ended.output_len == 2 and ended.finish.kind == "length"
    assert cached(s, [*words(0, 10), TOKEN]) == 11 and s.kv.used_tokens == 0
    s.rest()


@pytest.mark.parametrize(("rule", "third"), [("landed", None), ("at_once", ["b"])])
def test_its_place_goes_with_the_kv_and_its_row_stays_until_the_batch_has_landed(rule, third):
    s = scheduler(max_running=1, give_back=rule)
    prompt, last = two_in_flight(s, 2, generate("b", words(100, 10), 2))
    process(s, prompt)
    assert next_rids(s) == third
    if third:
        row = int(last.worker.rows[0])
        assert int(s.flights[-1].worker.rows[0]) != row
        assert process(s, last).ended[0].rid == "a"
    finish_all_in_flight(s)
    s.rest()


@pytest.mark.parametrize(("rule", "kept"), [("landed", 10), ("at_once", 11)])
def test_of_who_stops_by_eos_the_kv_of_that_token_is_kept_if_it_is_in_flight(rule, kept):
    s = scheduler(give_back=rule)
    prompt, after = two_in_flight(s, 9)
    assert [req.rid for req in s.process(prompt, StepOutput(np.array([EOS], np.int32))).ended] == ["a"]
    s.check()
    process(s, after)
    assert after.dropped == {0}
    assert cached(s, [*words(0, 10), EOS]) == kept
    s.rest()


def test_a_chunk_that_has_landed_brought_no_token_and_gives_nothing_back():
    s = scheduler(chunk=6, chunk_cut="tokens", give_back="at_once")
    first, last = two_in_flight(s, 1)
    process(s, first)
    assert s.kv.used_tokens == 10
    assert process(s, last).ended[0].output_len == 1
    s.rest()


def test_an_abort_between_an_early_end_and_its_last_token_gives_nothing_back_twice():
    s = scheduler(give_back="at_once")
    prompt, last = two_in_flight(s, 2)
    process(s, prompt)
    s.receive([Abort("a")])
    (ended,) = s.take_ended()
    assert ended.finish.kind == "aborted" and ended.output_len == 1
    assert not process(s, last).ended and last.dropped == {0}
    s.rest()


def test_an_early_end_loses_nothing_of_a_session():
    s = scheduler(give_back="at_once")
    s.receive([OpenSession("chat", lambda refusal: None)])
    s.receive([generate("a", words(0, 10), 2, session="chat")])
    prompt, last = form(s), form(s)
    process(s, prompt, 5)
    process(s, last, 6)
    assert s.sessions.tokens_of("chat").tolist() == [*words(0, 10), 5, 6]


def test_a_prompt_that_ends_early_is_shared_in_its_turn_among_those_that_go_on():
    # By row: b, which ends with the batch in flight, goes in between a and c, so that a goes first when KV is short.
    s = scheduler(**ALL)
    s.receive([generate("a", words(0, 8), 9), generate("b", words(100, 8), 2), generate("c", words(200, 8), 9)])
    prompts, _ = form(s), form(s)
    process(s, prompts)
    s.receive([Abort("a"), Abort("c")])
    finish_all_in_flight(s)
    tree = s.kv.cache.tree  # type: ignore[attr-defined]
    assert sorted(tree.nodes(), key=lambda node: node.created)[1].key[0] == 100
