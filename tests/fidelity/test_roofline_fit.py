"""The roofline's numbers are those that come nearest to published operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest

from backends.simulated.catalogue.gpu_specs import GPU, load_gpu
from backends.simulated.cost.models.expert_loads import distinct_experts
from backends.simulated.cost.tables.published_package import at_hand, find_tables
from benchmarks.board.collective_kinds import ring, shots
from benchmarks.board.operator_fit import Fit
from benchmarks.board.operator_kinds import (
    BF16,
    BLOCKS,
    FP8,
    W4,
    decodes,
    experts,
    latent_decodes,
    latent_prompts,
    products,
    prompts,
)
from benchmarks.board.table_rows import Tables
from benchmarks.roofline_fit import LEAST_SHARE, OWN_GAIN

WAYS: dict[str, tuple[Callable[[Tables, GPU], Fit | None], float]] = {
    "products": (lambda t, g: products(t, g, BF16, "bfloat16"), 0.08),
    "products by block": (lambda t, g: products(t, g, BLOCKS, "fp8_block"), 0.12),
    "experts": (lambda t, g: experts(t, g, replace(BLOCKS, prefix=FP8.prefix), "fp8_block"), 0.08),
    "decodes of grouped queries": (lambda t, g: decodes(t, g, True, "bfloat16"), 0.08),
    "decodes of a KV head a head": (lambda t, g: decodes(t, g, False, "bfloat16"), 0.08),
    "prompts of a KV head a head": (lambda t, g: prompts(t, g, False), 0.16),
    "latent decodes": (latent_decodes, 0.10),
    "latent prompts": (latent_prompts, 0.10),
}
"""How a kind of operator is fitted, and the error that it may have on the other half."""


@pytest.fixture(scope="module")
def tables() -> Tables:
    if not at_hand("h100", "sglang"):
        pytest.skip("aiconfigurator-core is not installed")
    return Tables(find_tables(load_gpu("h100"), "sglang").system)


@pytest.mark.parametrize("kind", WAYS)
def test_the_catalogue_has_the_numbers_that_the_tables_give(tables, kind):
    way, most = WAYS[kind]
    gpu = load_gpu("h100")
    found = way(tables, gpu)
    assert found is not None and found.error < most
    assert found.values == pytest.approx({name: getattr(gpu, name) for name in found.values}, rel=0.05, abs=2e-9)
    assert abs(found.fitted - found.scored) < 0.1 * (found.fitted + found.scored)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engine_has_numbers_of_its_own_where_they_are_much_nearer(tables, engine):
    gpu = load_gpu("h100")
    found = experts(Tables(tables.system, engine), gpu, W4, "w4a16_mxfp4")
    assert found is not None and found.gained > OWN_GAIN and found.error < 0.13
    own = gpu.under(f"{engine}-0.1")
    assert found.values == pytest.approx({name: getattr(own, name) for name in found.values}, rel=0.05, abs=2e-9)
    products_too = products(Tables(tables.system, engine), gpu, BF16, "bfloat16")
    assert products_too is not None and products_too.gained < OWN_GAIN
    assert own.compute_efficiency == gpu.compute_efficiency


def test_experts_by_tensor_that_take_longer_than_in_16_bits_are_nobodys_numbers(tables):
    gpu = load_gpu("h100")
    found = experts(Tables(tables.system, "vllm"), gpu, FP8, "fp8")
    assert found is not None and found.values["fp8_expert_memory_efficiency"] < LEAST_SHARE
    assert gpu.under("vllm-0.33.0").fp8_expert_memory_efficiency == gpu.fp8_expert_memory_efficiency > LEAST_SHARE


def test_times_of_uneven_experts_follow_how_many_have_tokens(tables):
    rows = pd.read_parquet(next((tables.system / "moe" / "vllm").glob("*/moe_perf.parquet")))
    rows = rows[rows.moe_dtype.eq("bfloat16") & rows.num_experts.eq(128) & rows.topk.eq(8) & rows.moe_ep_size.eq(1)]
    rows = rows[rows.hidden_size * rows.inter_size / rows.moe_tp_size > 2e6]  # whose weights take most of the time
    mean = rows.groupby(["num_tokens", "distribution"]).latency.mean()
    for tokens in (4, 8, 16, 32, 64, 128):
        less = mean[tokens, "power_law_1.01"] / mean[tokens, "balanced"]
        assert less == pytest.approx(distinct_experts(128, 8, tokens, 1.01) / min(tokens * 8, 128), abs=0.06)


def test_collectives_have_the_numbers_that_the_tables_give(tables):
    gpu = load_gpu("h100")
    of_ring, of_shots = ring(tables, gpu), shots(tables, gpu)
    assert of_ring is not None and of_ring.error < 0.11
    for found in (of_ring, of_shots):
        assert found is not None
        assert found.values == pytest.approx({name: getattr(gpu, name) for name in found.values}, rel=0.05, abs=2e-8)
    own = shots(Tables(tables.system, "sglang"), gpu)
    assert own is not None and own.gained > OWN_GAIN and own.error < 0.09
    sglang = gpu.under("sglang-0.5.14")
    assert own.values == pytest.approx({name: getattr(sglang, name) for name in own.values}, rel=0.05, abs=2e-8)
    assert ring(Tables(tables.system, "sglang"), gpu) is None, "NCCL is no engine's"


@pytest.mark.parametrize("name", ["l40s", "rtx-pro-6000"])
def test_all_reduces_of_pairs_over_pcie_are_within_a_twentieth(name):
    gpu = load_gpu(name)
    if not at_hand(name, "sglang"):
        pytest.skip("aiconfigurator-core is not installed")
    found = shots(Tables(find_tables(gpu, "sglang").system), gpu)
    assert found is not None and found.error < 0.05
    assert found.values == pytest.approx({name: getattr(gpu, name) for name in found.values}, rel=0.05, abs=2e-8)
