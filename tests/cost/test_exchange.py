"""What ranks exchange whose experts lie on all of them, and to what they pad their tokens."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.checkpoint.layer_kinds import Experts
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.communication import all_gather_s, all_reduce_s, all_to_all_s
from backends.simulated.cost.models.exchange import KINDS, Exchange, ExchangeRule
from backends.simulated.cost.models.group_tokens import group_tokens
from backends.simulated.cost.models.operator_tables import Grid
from backends.simulated.cost.models.roofline import RooflineCost
from tests.cost.test_roofline import batch
from workbench.cluster.pools import resolve_pools
from workbench.settings.loading import settings_from
from workbench.settings.run_settings import ExpertExchange

GPU = load_gpu("h100").with_links(100e9, 10e-6)
EXPERTS = Experts(128, 8, 768)
HIDDEN = 2048


def seconds(kind, tokens, prompts=False, *, gpu=GPU, tp=1, eight_bits=False, **rule):
    return Exchange(kind, ExchangeRule(**rule), gpu, tp, eight_bits).seconds(EXPERTS, HIDDEN, tokens, prompts)


def test_the_setting_has_the_ways_that_there_are():
    assert get_args(ExpertExchange) == KINDS


def test_an_all_to_all_sends_every_token_to_each_of_its_experts_and_back():
    assert seconds("all-to-all", [64, 32]) == pytest.approx(2 * all_to_all_s(64 * 8 * HIDDEN * 2, 2, GPU))


def test_a_gather_takes_in_the_tokens_of_all_others_and_what_travels_with_them():
    there, back = 100 * (HIDDEN * 2 + 8 * 8), 100 * HIDDEN * 2
    assert seconds("allgather-reducescatter", [100, 40]) == pytest.approx(2 * 10e-6 + (there + back) / 100e9)
    logits = 100 * (HIDDEN * 2 + 128 * 2)
    found = seconds("allgather-reducescatter", [100, 40], sends="logits")
    assert found == pytest.approx(2 * 10e-6 + (logits + back) / 100e9)
    eight = 100 * (HIDDEN * (1 + 4 / 128) + 8 * 8)
    found = seconds("allgather-reducescatter", [100, 40], eight_bits=True, sends="logits", quantised=True)
    assert found == pytest.approx(2 * 10e-6 + (eight + back) / 100e9)
    assert seconds("allgather-reducescatter", [100, 40], eight_bits=True, sends="logits") > found


def test_where_both_directions_share_the_way_through_the_host_the_traffic_of_all_counts():
    peers, host = load_gpu("rtx-pro-6000"), load_gpu("rtx-pro-6000").with_links(16e9, 20e-6)
    assert host.shares_directions and not peers.shares_directions and not GPU.shares_directions
    row = HIDDEN * 4 + 8 * 8
    one, even = (seconds("allgather-reducescatter", tokens, gpu=host) for tokens in ([1000, 0], [500, 500]))
    assert one == pytest.approx(even) == pytest.approx(2 * 20e-6 + 500 * row / 16e9)
    peers = peers.with_links(54.4e9, 15e-6)
    assert not peers.shares_directions
    alone = seconds("allgather-reducescatter", [1000, 0], gpu=peers)
    assert alone == pytest.approx(2 * 15e-6 + 1000 * row / 54.4e9)


def test_measured_collectives_take_the_place_of_links():
    exchange = Exchange("allgather-reducescatter", ExchangeRule(), GPU, 1)
    exchange.gather = Grid(([0.0, 1e6],), np.array([1e-4, 2e-4]))
    exchange.scatter = Grid(([0.0, 1e6],), np.array([3e-4, 3e-4]))
    there = 2 * 50 * (HIDDEN * 2 + 8 * 8)
    assert exchange.seconds(EXPERTS, HIDDEN, [50, 7], False) == pytest.approx(1e-4 * (1 + there / 1e6) + 3e-4)
    even, uneven = (exchange.seconds(EXPERTS, HIDDEN, tokens, False) for tokens in ([50] * 4, [50, 7, 7, 7]))
    taken = (50 + 2 * 7) * 4 / 3 * (HIDDEN * 2 + 8 * 8)
    assert uneven == pytest.approx(1e-4 * (1 + taken / 1e6) + 3e-4) and uneven < even


def test_naive_ranks_broadcast_one_after_the_other_and_reduce_everything():
    row, meta = HIDDEN * 2, 128 * 2
    there = 4 * 10e-6 + (64 + 32) * (row + meta) / 100e9
    assert seconds("naive", [64, 32]) == pytest.approx(there + all_reduce_s(96 * row, 2, GPU))


def test_without_an_all_to_all_sglang_reduces_the_sum_with_prompts_and_gathers_the_largest_without():
    row = HIDDEN * 2
    assert seconds("sum-or-max", [300, 20], True) == pytest.approx(2 * all_reduce_s(320 * row, 2, GPU))
    assert seconds("sum-or-max", [30, 20]) == pytest.approx(2 * all_gather_s(60 * row, 2, GPU))
    # Padding eight ranks to the one that has most would move more than the sum does.
    lone = [64, *[1] * 7]
    assert seconds("sum-or-max", lone) == pytest.approx(2 * all_reduce_s(71 * row, 8, GPU))


def test_deepep_sends_a_token_once_to_a_gpu_in_normal_and_once_to_an_expert_in_low_latency():
    tokens = [128] * 8
    normal, low = seconds("deepep-normal", tokens, True), seconds("deepep-low-latency", tokens)
    assert seconds("deepep", tokens, True) == normal and seconds("deepep", tokens) == low
    none = 1.0
    for drawn in range(8):
        none *= (112 - drawn) / (128 - drawn)
    row = 2 * HIDDEN * 2 + 8 * 8
    assert normal == pytest.approx(3 * 10e-6 + 128 * 7 * (1 - none) * row / 100e9)
    assert low == pytest.approx(2 * 10e-6 + 128 * 8 * 7 / 8 * row / 100e9)
    eight = seconds("deepep-low-latency", tokens, eight_bits=True)
    assert low - eight == pytest.approx(128 * 7 * (HIDDEN * (1 - 4 / 128)) / 100e9)
    large = seconds("deepep-low-latency", [257] * 8)
    assert large > seconds("deepep-low-latency", [256] * 8) + 2 * 10e-6


def test_deepep_sends_a_token_once_to_another_node():
    two = dataclasses.replace(GPU, gpus_per_node=4, node_link_bandwidth=10e9, node_link_latency_s=30e-6)
    tokens = [1000] * 8
    none = 1.0
    for drawn in range(8):
        none *= (64 - drawn) / (128 - drawn)
    row = 2 * HIDDEN * 2 + 8 * 8
    far = 2 * 30e-6 + 10e-6 + 1000 * (1 - none) * row / 10e9
    assert seconds("deepep-normal", tokens, True, gpu=two) == pytest.approx(far)
    assert seconds("deepep-low-latency", tokens, gpu=two) > far


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 4096), min_size=2, max_size=8),
    st.booleans(),
    st.sampled_from([1, 2]),
)
def test_more_tokens_or_a_slower_link_never_make_an_exchange_shorter(kind, tokens, prompts, tp):
    found = seconds(kind, tokens, prompts, tp=tp)
    assert found > 0
    slow = GPU.with_links(link=50e9)
    assert seconds(kind, tokens, prompts, tp=tp, gpu=slow) >= found
    assert seconds(kind, [2 * count for count in tokens], prompts, tp=tp) >= found


def test_one_gpu_exchanges_nothing():
    for kind in KINDS:
        assert seconds(kind, [100]) == 0


# -- padding ---------------------------------------------------------------------------------------------------------

SMALL, LARGE = batch([], [100] * 5), batch([], [100] * 20)
PROMPTS, LONG = batch([(0, 100)], [100] * 5), batch([(0, 1000)], [100] * 5)
DECODES, MIXED = [1, 2, 4, 8, 16, 24, 32], [8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("batches", "pads", "tokens"),
    [
        ([SMALL, LARGE], "own", [24, 24]),  # all replay the graph of the largest
        ([SMALL, None], "own", [8, 8]),
        ([SMALL, PROMPTS], "own", [8, 128]),
        ([SMALL, LONG], "own", [8, 1005]),
        ([SMALL, LARGE], "graphs", [24, 24]),
        ([SMALL, PROMPTS], "graphs", [128, 128]),  # pieces of graphs, which all replay
        ([SMALL, LONG], "graphs", [5, 1005]),  # one replays none, so nobody does
        ([None, LONG], "graphs", [1, 1005]),
        ([SMALL, LONG], "always", [1005, 1005]),
        ([SMALL, PROMPTS], "always", [128, 128]),
    ],
)
def test_ranks_pad_their_tokens_as_the_engine_does(batches, pads, tokens):
    assert group_tokens(batches, DECODES, MIXED, pads) == tokens


def test_without_graphs_nothing_is_padded_but_where_it_always_is():
    assert group_tokens([SMALL, LARGE], [], [], "own") == [5, 20]
    assert group_tokens([SMALL, LARGE], [], [], "graphs") == [5, 20]
    assert group_tokens([SMALL, LARGE], [], [], "always") == [20, 20]


# -- engines ---------------------------------------------------------------------------------------------------------


def exchange_of(**flags):
    made = settings_from(None, {"model": "Qwen/Qwen3-30B-A3B", "dp": 2, "ep": 2, **flags})
    return resolve_pools(made, "overlap")[0].recipe.cost.exchange


@pytest.mark.parametrize(
    ("engine", "kind", "rule"),
    [
        ("workbench", "all-to-all", ExchangeRule()),
        ("vllm-0.14.0", "allgather-reducescatter", ExchangeRule("always", "logits")),
        ("vllm-0.19.0", "allgather-reducescatter", ExchangeRule("graphs", "logits", True)),
        ("vllm-0.33.0", "allgather-reducescatter", ExchangeRule("graphs", "choices", True)),
        ("sglang-0.5.23", "sum-or-max", ExchangeRule()),
        ("sglang-0.5.10.post1", "sum-or-max", ExchangeRule()),
        ("sglang-0.4.10.post2", "sum-or-max", ExchangeRule(prompts_summed=False)),
    ],
)
def test_each_engine_exchanges_in_its_own_way(engine, kind, rule):
    found = exchange_of(engine=engine)
    assert (found.kind, found.rule) == (kind, rule)
    assert exchange_of(engine=engine, expert_exchange="deepep").kind == "deepep"


def test_sglangs_instances_that_share_experts_share_a_chunk_and_are_less_conservative():
    alone = settings_from(None, {"engine": "sglang-0.5.23", "dp": 4})
    shared = settings_from(None, {"engine": "sglang-0.5.23", "dp": 4, "ep": 4, "model": "Qwen/Qwen3-30B-A3B"})
    assert (alone.chunk, shared.chunk) == (8192, 2048)
    assert shared.conservativeness == pytest.approx(0.3 * alone.conservativeness)
    asked = {"engine": "sglang-0.5.23", "dp": 4, "ep": 4, "model": "Qwen/Qwen3-30B-A3B", "chunk": 4096}
    assert settings_from(None, asked).chunk == 4096
    vllm = {"engine": "vllm-0.33.0", "dp": 4, "model": "Qwen/Qwen3-30B-A3B"}
    assert settings_from(None, vllm).max_batch_tokens == settings_from(None, {**vllm, "ep": 4}).max_batch_tokens


def test_experts_that_gpus_of_one_instance_share_are_added_up_by_engines():
    model, gpu = load_model("Qwen/Qwen3-30B-A3B"), load_gpu("h100")
    step = batch([], [1000] * 32)
    engine = Exchange("allgather-reducescatter", ExchangeRule(), gpu, 2)
    added = RooflineCost(model, gpu, tp=2, ep=2, exchange=engine).explain(step)
    sent = RooflineCost(model, gpu, tp=2, ep=2).explain(step)
    whole = RooflineCost(model, gpu, tp=2).explain(step)
    assert "all_to_all" not in added and added["all_reduce"] == whole["all_reduce"]
    assert sent["all_to_all"] > 0 and sent["all_reduce"] < added["all_reduce"]


def test_a_step_taken_together_waits_for_the_exchange_of_the_largest_rank():
    model, gpu = load_model("Qwen/Qwen3-30B-A3B"), load_gpu("l40s")
    exchange = Exchange("allgather-reducescatter", ExchangeRule("graphs"), gpu, 1)
    cost = RooflineCost(model, gpu, ep=2, exchange=exchange)
    some, more = batch([], [1000] * 16), batch([(0, 1000)], [1000] * 16)
    alone, both = cost.group_forward([some, some]), cost.group_forward([some, more])
    assert both > alone + 48 * (exchange.seconds(model.routed, model.hidden, [16, 1016], True) - 2e-4)
    slow = RooflineCost(model, gpu.with_links(link=10e9), ep=2, exchange=Exchange("naive", ExchangeRule(), gpu, 1))
    assert slow.group_forward([some, more]) > both


def test_deepeps_normal_kernels_are_captured_in_no_graph():
    made = settings_from(None, {"model": "Qwen/Qwen3-30B-A3B", "dp": 2, "ep": 2, "expert_exchange": "deepep-normal"})
    recipe = resolve_pools(made, "overlap")[0].recipe
    assert recipe.capture_sizes == recipe.mixed_capture_sizes == [] and recipe.host.graph_max_batch == 0
    assert "graphs: none are replayed, for DeepEP's normal kernels cannot be captured" in recipe.notes
    assert resolve_pools(dataclasses.replace(made, expert_exchange="deepep"), "overlap")[0].recipe.capture_sizes
