"""Rules of eviction and of the prefix cache that SGLang has and this project's defaults have not, one at a time."""

from __future__ import annotations

import pytest

from tests.scheduler.by_hand import (
    TOKEN,
    cached,
    extends,
    finish_all,
    form,
    generate,
    next_rids,
    process,
    serve,
    step,
    words,
)
from tests.scheduler.by_hand import eager as scheduler
from workbench.scheduler.messages import UpdateWeights

# -- eviction and the prefix cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evict_for", "computed"), [("row", [25, 21]), ("batch", [25, 1])])
def test_eviction_for_a_whole_batch_spares_what_its_prompts_find(evict_for, computed):
    s = scheduler(kv_tokens=60, evict_for=evict_for)
    serve(s, generate("f", words(0, 20), 1), generate("g", words(100, 20), 1))
    s.receive([generate("a", words(200, 25), 1), generate("b", [*words(0, 20), 300], 1)])
    assert extends(step(s)) == computed


@pytest.mark.parametrize(("evict_for", "left"), [("row", 8), ("batch", 8), ("batch-ahead", 0)])
def test_a_decode_may_evict_for_pages_that_it_does_not_start(evict_for, left):
    s = scheduler(kv_tokens=20, page_size=4, evict_for=evict_for)
    serve(s, generate("f", words(0, 8), 1))
    s.receive([generate("a", words(100, 5), 8)])
    while s.kv.pool.free:
        step(s)
    assert cached(s, words(0, 8)) == 8
    form(s)
    assert cached(s, words(0, 8)) == left


@pytest.mark.parametrize(("amount", "left"), [("missing", (0, 5)), ("all", (0, 0))])
def test_as_much_may_be_evicted_as_is_wanted_and_not_as_is_missing(amount, left):
    s = scheduler(kv_tokens=20, evict_amount=amount)
    serve(s, generate("f", words(0, 5), 1), generate("g", words(100, 5), 1))
    s.receive([generate("a", words(200, 12), 1)])
    step(s)
    assert (cached(s, words(0, 5)), cached(s, words(100, 5))) == left


@pytest.mark.parametrize(("share", "computed"), [("launch", [1]), ("result", [21])])
def test_a_prompt_may_be_shared_only_when_its_result_comes(share, computed):
    s = scheduler(share_prompts=share)
    s.receive([generate("a", words(0, 20), 5)])
    in_flight = form(s)
    s.receive([generate("b", [*words(0, 20), 300], 1)])
    assert extends(form(s)) == computed
    process(s, in_flight)
    assert cached(s, words(0, 20)) == 20


def test_a_prompt_in_part_is_shared_with_the_next_choice_either_way():
    s = scheduler(chunk=16, share_prompts="result")
    s.receive([generate("a", words(0, 40), 5)])
    form(s)
    form(s)
    assert cached(s, words(0, 40)) == 16


def test_shared_with_its_result_a_prompt_is_all_that_is_shared_though_it_decodes_already():
    s = scheduler(share_prompts="result")
    s.receive([generate("a", words(0, 20), 2)])
    prefill, decode = form(s), form(s)
    process(s, prefill)
    assert cached(s, [*words(0, 20), TOKEN]) == 20
    process(s, decode)
    assert cached(s, [*words(0, 20), TOKEN]) == 21


@pytest.mark.parametrize("touches", [False, True])
def test_what_the_cache_knows_may_count_as_used_when_it_is_put_in_again(touches):
    s = scheduler(page_size=4, touch_known=touches)
    serve(s, generate("f", words(0, 5), 1), generate("g", words(100, 5), 1))
    s.receive([generate("h", words(0, 5), 2)])
    step(s)
    s.receive([generate("i", words(100, 5), 1)])
    finish_all(s)  # i comes and goes before h, which adds nothing to its page
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 4)), cached(s, words(100, 4))) == ((4, 0) if touches else (0, 4))


@pytest.mark.parametrize("splits", [False, True])
def test_an_output_may_be_evicted_without_its_prompt(splits):
    s = scheduler(split_at_prompt=splits)
    s.receive([generate("a", words(0, 10), 4)])
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
    serve(s, generate("f", words(0, 20), 1), generate("g", words(100, 20), 1))
    s.receive([generate("r", words(200, 5), 5)])
    step(s)
    s.receive([generate("w", words(0, 30), 1)])
    assert next_rids(s) == ["r"]
    s.kv.cache.evict(1)
    assert (cached(s, words(0, 20)), cached(s, words(100, 20))) == ((0, 20) if refresh is None else (20, 0))
