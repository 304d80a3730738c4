"""Traps of the order of the queue, and of policies of one's own."""

from __future__ import annotations

from itertools import groupby

import pytest

from tests.scheduler.by_hand import (
    both_batchings,
    generate,
    scheduler,
    words,
)
from tests.world import Job, Run, simulate
from workbench.scheduler.config import ConfigError
from workbench.scheduler.policy import Policy


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
