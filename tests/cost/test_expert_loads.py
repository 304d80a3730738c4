"""Tokens that crowd on few experts: which are touched, and how much more the most loaded GPU has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.exchange import Exchange, ExchangeRule
from backends.simulated.cost.models.expert_loads import distinct_experts, expert_shares, imbalance, tokens_of_experts
from backends.simulated.cost.models.roofline import RooflineCost
from tests.cost.test_roofline import batch
from workbench.cluster.pools import resolve_pools
from workbench.scheduler.config import ConfigError
from workbench.settings.loading import settings_from

cases = st.tuples(st.sampled_from([8, 64, 128, 256]), st.sampled_from([1, 2, 8]), st.integers(1, 20_000))


def test_without_skew_every_expert_is_as_likely():
    assert expert_shares(64, 8, 100, 0.0).tolist() == [1 / 64] * 64
    assert distinct_experts(64, 8, 100) == pytest.approx(64 * (1 - (1 - 8 / 64) ** 100))
    assert imbalance(64, 8, 100, 0.0, 8) == 1.0


def test_loads_are_the_quantiles_of_the_power_law():
    # log2(most / least) = log2(0.8 * 160) = 7 over four experts at 1/8, 3/8, 5/8 and 7/8.
    loads = np.array([2 ** (7 * at) for at in (0.125, 0.375, 0.625, 0.875)])
    assert expert_shares(4, 1, 160, 1.0) == pytest.approx(loads / loads.sum())
    assert expert_shares(4, 1, 160, 1.0001) == pytest.approx(loads / loads.sum(), rel=1e-3)


def test_loads_are_rounded_and_what_is_lost_goes_to_those_with_the_fewest():
    # 16 tokens choose 8 of 128 experts each: 57 shares of one choice on the mean round to some, which are 120 choices.
    loads = tokens_of_experts(128, 8, 16, 1.01)
    shares = np.rint(expert_shares(128, 8, 16, 1.01) * 128).astype(int)
    lost = 128 - int(shares.sum())
    assert lost > 0 and loads.tolist() == sorted([*[1] * lost, *shares[lost:].tolist()])
    assert (
        distinct_experts(128, 8, 16, 1.01) == np.count_nonzero(shares) + lost < 0.6 * 128 < distinct_experts(128, 8, 16)
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases, st.sampled_from([0.5, 1.0, 1.01, 1.2, 2.0]), st.sampled_from([2, 4, 8]))
def test_skew_touches_fewer_experts_and_loads_one_gpu_more(case, skew, parts):
    count, per_token, tokens = case
    shares = expert_shares(count, per_token, tokens, skew)
    assert shares.sum() == pytest.approx(1) and (np.diff(shares) >= 0).all()
    loads = tokens_of_experts(*case, skew)
    assert loads.sum() == tokens * per_token and (np.diff(loads) >= 0).all() and 0 <= loads[0] <= loads[-1] <= tokens
    touched = distinct_experts(*case, skew)
    assert touched == np.count_nonzero(loads)
    if tokens * per_token > 2 * count and skew <= 1.2:
        assert touched <= distinct_experts(*case) + 1
    assert 1 <= imbalance(*case, skew, parts) <= parts * (1 + 1e-9)


def test_the_most_loaded_of_two_gpus_is_what_dealing_experts_at_random_gives():
    shares = expert_shares(128, 8, 256, 1.01)
    dealt = np.random.default_rng(1)
    drawn = [2 * max(part := float(dealt.permutation(shares)[:64].sum()), 1 - part) for _ in range(4000)]
    assert imbalance(128, 8, 256, 1.01, 2) == pytest.approx(np.mean(drawn), rel=0.02)
    eight = [8 * dealt.permutation(shares).reshape(8, 16).sum(axis=1).max() for _ in range(4000)]
    assert imbalance(128, 8, 256, 1.01, 8) == pytest.approx(np.mean(eight), rel=0.06)


def test_uneven_experts_take_longer_where_they_are_spread_and_many_are_touched():
    model, gpu = load_model("Qwen/Qwen3-30B-A3B"), load_gpu("h100")
    long = batch([(0, 8000)])
    even, skewed = (
        RooflineCost(model, gpu, tp=4, ep=4, expert_skew=skew).explain(long)["experts"] for skew in (0.0, 1.2)
    )
    assert skewed > 1.2 * even
    divided = [RooflineCost(model, gpu, tp=4, expert_skew=skew).explain(long)["experts"] for skew in (0.0, 1.2)]
    assert divided[1] <= divided[0], "tensor parallelism divides every expert"
    some = batch([], [500] * 16)
    few = [RooflineCost(model, gpu, expert_skew=skew).explain(some)["experts"] for skew in (0.0, 1.2)]
    assert few[1] < few[0], "fewer experts are read"


def test_the_gpu_with_the_most_loaded_experts_takes_in_more():
    model, gpu = load_model("Qwen/Qwen3-30B-A3B"), load_gpu("h100")
    for kind, longer in (("all-to-all", True), ("deepep-low-latency", True), ("allgather-reducescatter", False)):
        even, skewed = (
            Exchange(kind, ExchangeRule(), gpu, 1, skew=skew).seconds(model.routed, model.hidden, [512] * 8, False)
            for skew in (0.0, 1.2)
        )
        assert (skewed > even) is longer


def test_the_skew_is_asked_for_of_models_that_have_experts():
    made = settings_from(None, {"model": "Qwen/Qwen3-8B", "expert_skew": 1.2})
    with pytest.raises(ConfigError, match=r"expert_skew: Qwen/Qwen3-8B has no experts"):
        resolve_pools(made, "overlap")
    made = settings_from(None, {"model": "Qwen/Qwen3-30B-A3B", "expert_skew": 1.2})
    assert resolve_pools(made, "overlap")[0].recipe.cost.expert_skew == 1.2
