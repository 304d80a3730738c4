"""Routers: who takes turns, who sticks, and that nobody idles while another has work."""

from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.cluster.router import BALANCE_ABS_THRESHOLD, ROUTERS, Router

DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=60)


def prompt_of(number: int, tokens: int = 1000) -> np.ndarray:
    """A prompt that shares no prefix with another number's."""
    return np.arange(number * 1_000_000, number * 1_000_000 + tokens, dtype=np.int32)


@pytest.mark.parametrize("kind", ROUTERS)
@given(instances=st.integers(2, 9), rounds=st.integers(1, 5), lengths=st.lists(st.integers(1, 700), min_size=1))
@DETERMINISTIC
def test_idle_instances_take_turns(kind, instances, rounds, lengths):
    router = Router(kind, instances)
    chosen = []
    for number in range(instances * rounds):  # each request ends before the next one comes
        prompt = prompt_of(number, lengths[number % len(lengths)])
        chosen.append(router.choose(prompt))
        router.answered(chosen[-1], len(prompt))
        router.ended(chosen[-1], len(prompt))
    assert Counter(chosen) == {instance: rounds for instance in range(instances)}


@pytest.mark.parametrize("kind", ["least_requests", "least_tokens", "cache_aware"])
@given(instances=st.integers(2, 6), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=120))
@DETERMINISTIC
def test_new_work_never_goes_to_a_busy_instance_while_another_is_idle(kind, instances, moves):
    router, open_requests = Router(kind, instances), []
    for number, (arrives, value) in enumerate(moves):
        if arrives or not open_requests:
            prompt = prompt_of(number, 1 + value)
            busy = {instance for instance, _ in open_requests}
            chosen = router.choose(prompt)
            assert chosen not in busy or len(busy) == instances
            open_requests.append((chosen, len(prompt)))
        else:
            router.ended(*open_requests.pop(value % len(open_requests)))


def test_the_least_loaded_is_counted_in_requests_or_in_prompt_tokens():
    by_requests, by_tokens = Router("least_requests", 2), Router("least_tokens", 2)
    sizes = [900, 100, 100, 100]
    assert [by_requests.choose(prompt_of(i, n)) for i, n in enumerate(sizes)] == [0, 1, 0, 1]
    assert [by_tokens.choose(prompt_of(i, n)) for i, n in enumerate(sizes)] == [0, 1, 1, 1]


def test_cache_aware_sticks_to_what_it_has_seen_and_spreads_what_it_has_not():
    router = Router("cache_aware", 4)
    assert [router.choose(prompt_of(i)) for i in range(4)] == [0, 1, 2, 3]
    for turn in range(2, 9):  # conversations grow
        assert [router.choose(prompt_of(i, 1000 * turn)) for i in (2, 0, 3, 1)] == [2, 0, 3, 1]


def test_cache_aware_does_not_follow_a_short_common_start():
    router, start = Router("cache_aware", 4), prompt_of(99, 256)
    prompts = [np.concatenate((start, prompt_of(i, 1744))) for i in range(8)]
    assert [router.choose(prompt) for prompt in prompts] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_cache_aware_leaves_the_cache_when_load_is_uneven():
    router = Router("cache_aware", 2)
    chosen = [router.choose(prompt_of(1)) for _ in range(BALANCE_ABS_THRESHOLD + 3)]
    # From the first move on both have seen it, and the one with less to do gets it.
    assert chosen == [0] * (BALANCE_ABS_THRESHOLD + 1) + [1, 1]


def test_a_prompt_seen_in_another_namespace_is_new():
    router = Router("cache_aware", 2)
    assert [router.choose(prompt_of(1), name) for name in ("a", "b", "a", "b")] == [0, 1, 0, 1]


def test_the_soonest_first_token_is_expected_where_prompts_have_come_back_fastest_and_least_waits():
    now = [0.0]
    router = Router("expected_ttft", 2, lambda: now[0])
    # The first two take turns. The second instance answers twice as fast.
    assert [router.choose(prompt_of(number)) for number in range(2)] == [0, 1]
    now[0] = 1.0
    router.answered(1, 1000)
    now[0] = 2.0
    router.answered(0, 1000)
    # 1000 tokens: in 2 s there, in 1 s here, and 2 s behind the first: then it makes no difference, and they take turns.
    assert [router.choose(prompt_of(number)) for number in (2, 3)] == [1, 0]
    # 1000 wait on either; another 1000 take 4 s or 2.
    assert router.choose(prompt_of(4)) == 1


def test_an_instance_that_has_seen_a_prompt_is_expected_to_answer_it_sooner():
    ticks = count()
    router = Router("expected_ttft", 2, lambda: float(next(ticks)))
    first = router.choose(prompt_of(1))
    router.answered(first, 1000)
    other = router.choose(prompt_of(2))
    router.answered(other, 1000)
    assert other != first
    assert router.choose(prompt_of(2)) == other and router.choose(prompt_of(1)) == first


@pytest.mark.parametrize("kind", ROUTERS)
def test_an_instance_that_is_closed_gets_nothing_new(kind):
    router = Router(kind, 3)
    router.closed = {1}
    assert {router.choose(prompt_of(number % 2)) for number in range(12)} == {0, 2}
