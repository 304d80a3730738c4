"""Attention and recurrences out of published tables: read back where they were measured, plausible between and beyond."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.cost_request import CostError
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts, Seen
from backends.simulated.cost.models.operator_tables import Grid, ProfileError
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.tables.attention_kernels import of_one_kernel
from backends.simulated.cost.tables.measured_operators import read_measured
from backends.simulated.cost.tables.profiles import read_profile
from backends.simulated.cost.tables.published_package import PACKAGE, find_tables
from tests.cost.profiles import batch
from tests.cost.published import (
    absorbed_ms,
    decode_ms,
    delta_ms,
    experts_ms,
    product_ms,
    prompt_ms,
    rows_of,
    write_package,
    write_table,
)
from tests.cost.test_measured import measured, request_of, roofline

LITE, SPARSE, NEXT = "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3.2", "Qwen/Qwen3-Next-80B-A3B-Instruct"
ATTENTION = ("context_attention", "generation_attention")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of tables in place of whatever is installed."""
    monkeypatch.syspath_prepend(write_package(tmp_path))
    return tmp_path


def attention_ms(cost, step) -> float:
    """Milliseconds of all layers' attention and recurrences."""
    return cost.explain(step)["attention"] * 1e3


def rewrite(package, kind: str, *changes: dict, keep=lambda row: True) -> None:
    """A table with the usual rows once for each of the changes."""
    rows = [row | change for change in changes for row in rows_of(kind) if keep(row)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), write_table(package, kind))


# -- kinds of attention ------------------------------------------------------------------------------------------------


def test_latent_attention_is_read_with_the_products_that_decodes_absorb_and_prompts_run(package):
    for kind in ("context_mla", "generation_mla", "mla_bmm"):
        write_table(package, kind)
    cost = measured(LITE)
    layers = load_model(LITE).layers
    decodes = layers * (decode_ms(64, 1024) + 2 * absorbed_ms(64))
    assert attention_ms(cost, batch([1024] * 64)) == pytest.approx(decodes)
    # Keys and values of 16 heads of 128 + 128 out of latents of 512.
    prompts = layers * (prompt_ms(2048) + product_ms(2048, 4096, 512))
    assert attention_ms(cost, batch([2048], (2048,))) == pytest.approx(prompts)
    assert "kv_b_proj" not in cost.explain(batch([1024] * 64)), "counted once"
    found = cost.notes[0]
    assert "prompts of latent attention of 16 heads, 16 on a GPU in bf16" in found
    assert "products of absorbed decodes" in found


def test_without_a_table_of_absorbed_products_latents_are_expanded_by_a_product(package):
    write_table(package, "generation_mla")
    cost = measured(LITE)
    step = batch([1024] * 64)
    layers = load_model(LITE).layers
    assert attention_ms(cost, step) == pytest.approx(layers * decode_ms(64, 1024))
    assert cost.explain(step)["kv_b_proj"] == pytest.approx(layers * product_ms(64, 4096, 512) * 1e-3)
    assert "prompts of latent attention of 16 heads, 16 on a GPU in bf16" in cost.notes[-1]


def test_a_module_holds_the_products_around_latent_attention(package):
    for kind in ("mla_context_module", "mla_generation_module"):
        write_table(package, kind)
    cost = measured("deepseek-ai/DeepSeek-V3", dtype="bf16")
    step = batch([1024] * 64)
    assert attention_ms(cost, step) == pytest.approx(61 * (1.0 + decode_ms(64, 1024)))
    assert attention_ms(cost, batch([2048], (2048,))) == pytest.approx(61 * (1.0 + prompt_ms(2048) + 2.048))
    parts = cost.explain(step)
    assert not {"qkv_a_proj", "q_b_proj", "o_proj", "kv_b_proj", "projections"} & set(parts)
    assert "latent attention of 128 heads with the products around" in cost.notes[0]
    # Clocks wait for plain numbers, and numpy's are none, also where a prompt is longer than any that was measured.
    assert {type(cost.forward(of)) for of in (step, batch([2048], (2048,)), batch([9000], (9000,)))} == {float}
    # Of other hidden states the products around would be others.
    assert "q_proj" in measured(LITE).explain(step)


def test_sparse_attention_is_read_by_what_is_before_a_prompt_and_only_for_its_own_model(package):
    for kind in ("dsa_context_module", "dsa_generation_module"):
        write_table(package, kind)
    cost = measured(SPARSE, dtype="bf16")
    assert attention_ms(cost, batch([1024] * 64)) == pytest.approx(61 * (1.0 + decode_ms(64, 1024)))
    after = attention_ms(cost, batch([512 + 4096], (512,)))
    assert after == pytest.approx(61 * (1.0 + prompt_ms(512) + 1e-5 * 4096))
    between = attention_ms(cost, batch([512 + 2560], (512,)))
    assert between == pytest.approx(61 * (1.0 + prompt_ms(512) + 1e-5 * 2560))
    for other in (measured("zai-org/GLM-5", dtype="bf16"), measured(SPARSE, dtype="fp8"), measured(SPARSE, tp=2)):
        assert "over 2048 tokens that it chooses" in other.notes[-1]


def test_linear_attention_beside_attention_has_times_of_its_own(package):
    write_table(package, "gdn")
    for kind in ATTENTION:
        write_table(package, kind, num_key_value_heads=2, head_dim=256)
    cost, step = measured(NEXT), batch([1024] * 64)
    # Three of four layers: 36 of 48.
    assert attention_ms(cost, step) == pytest.approx(36 * delta_ms(64) + 12 * decode_ms(64, 1024))
    assert attention_ms(cost, batch([2048], (2048,))) == pytest.approx(36 * delta_ms(2048) + 12 * prompt_ms(2048))
    parts = cost.explain(step)
    assert {"in_proj_qkvz", "in_proj_ba", "out_proj", "qkv_proj", "o_proj"} <= set(parts)
    # What comes before a prompt is in its state.
    whole, after = (attention_ms(cost, batch([512 + cached], (512,))) for cached in (0, 3584))
    assert after - whole == pytest.approx(12 * 1e-7 * 512 * 3584)


def test_prompts_with_a_window_take_the_pairs_within_it_and_decodes_in_chunks_what_is_left_of_one(package):
    name = "openai/gpt-oss-20b"
    shape = {"num_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    for kind in ATTENTION:
        write_table(package, kind, **shape)
    cost = measured(name)
    alone = 12 * (prompt_ms(2048) + prompt_ms(128) + 1e-7 * 128 * (2048 - 128))
    assert attention_ms(cost, batch([2048], (2048,))) == pytest.approx(alone)
    chunks = MeasuredDecodes(Grid(([1.0, 64.0], [1.0, 8192.0]), np.array([[1.0, 2.0], [3.0, 4.0]])), Seen(8192, True))
    for context, seen in ((8192, 8192), (8193, 1), (20_000, 20_000 - 2 * 8192)):
        lens = np.array([context])
        found = chunks.seconds(lens, float(context), lambda *_: None)
        assert found == pytest.approx(1 + (seen - 1) / 8191)


@pytest.mark.parametrize(("heads", "kv_heads", "times"), [(32, 16, 2), (64, 32, 4), (8, 4, 0.5)])
def test_as_many_query_heads_a_kv_head_are_more_or_fewer_requests(package, heads, kv_heads, times):
    name = "Qwen/Qwen3-0.6B"
    model = load_model(name)
    assert (model.heads, model.kv_heads) == (16, 8)
    for kind in ATTENTION:
        write_table(package, kind, num_heads=heads, num_key_value_heads=kv_heads)
    cost = measured(name)
    # 64 requests of 8 KV heads are 32 of 16.
    assert attention_ms(cost, batch([1024] * 64)) == pytest.approx(28 * decode_ms(64 / times, 1024))
    assert f"(as more requests of {kv_heads} KV heads)" in cost.notes[0]


def test_attention_is_of_one_kernel_and_heads_measured_under_another_are_made_of_its(package):
    def rows(kind, kernel, factor, heads):
        some = ({**row, "kernel_source": kernel, "num_heads": count} for row in rows_of(kind) for count in heads)
        return [{**row, "latency": row["latency"] * row["num_heads"] / 16 * factor} for row in some]

    for kind in ATTENTION:
        # The slower one's half of the sizes that both have is the shortest at no other.
        both = rows(kind, "fast", 1, (8, 32)) + rows(kind, "slow", 30, (8, 16))
        parquet.write_table(pyarrow.Table.from_pylist(both), write_table(package, kind))
    step = batch([1024] * 64)
    found = attention_ms(measured(), step)
    assert found == pytest.approx(28 * decode_ms(64, 1024), rel=0.2), "16 heads lie between 8 and 32"
    assert any("16 heads between 8 and 32" in note for note in measured().notes)


def test_kernels_that_share_the_sizes_of_the_same_heads_are_one_backends(package):
    for kind in ATTENTION:
        usual = rows_of(kind)
        parted = [{**row, "kernel_source": "short" if row["batch_size"] == 1 else "long"} for row in usual]
        assert of_one_kernel({name: [row[name] for row in parted] for name in parted[0]}).all()
        twice = parted + [{**row, "kernel_source": "other"} for row in usual]
        kept = of_one_kernel({name: [row[name] for row in twice] for name in twice[0]})
        assert kept.sum() == len(usual) and kept[len(usual) :].all(), "the one with most rows"
    assert of_one_kernel({name: [row[name] for row in usual] for name in usual[0]}).all(), "a table of no kernels"


def test_heads_of_a_size_between_two_measured_ones_are_between_their_times(package):
    for kind in ATTENTION:
        rows = [
            row | {"head_dim": size, "latency": row["latency"] * size / 128}
            for size in (64, 256)
            for row in rows_of(kind)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), write_table(package, kind))
    cost = measured()
    assert attention_ms(cost, batch([1024] * 64)) == pytest.approx(28 * decode_ms(64, 1024))
    assert "between heads of 64 and 256" in cost.notes[0]


def test_kv_in_eight_bits_has_rows_of_its_own(package):
    for kind in ATTENTION:
        rewrite(package, kind, {}, {"kv_cache_dtype": "fp8", "latency": 7.0})
    step = batch([1024] * 64)
    assert attention_ms(measured(kv_dtype="fp8"), step) == pytest.approx(28 * 7.0)
    assert attention_ms(measured(), step) == pytest.approx(28 * decode_ms(64, 1024))
    assert "in fp32" in measured(kv_dtype="fp32").notes[-1]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_several_prompts_are_looked_up_as_so_many(package):
    rows = [
        row | {"batch_size": n, "latency": 5.0 + n * prompt_ms(row["isl"])}
        for n in (1, 2, 8)
        for row in rows_of("context_attention")
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), write_table(package, "context_attention"))
    cost = measured()
    assert attention_ms(cost, batch([512] * 8, (512,) * 8)) == pytest.approx(28 * (5.0 + 8 * prompt_ms(512)))
    assert attention_ms(cost, batch([2048] * 2, (2048,) * 2)) == pytest.approx(28 * (5.0 + 2 * prompt_ms(2048)))


def test_a_few_tokens_after_many_take_as_long_as_a_decode_that_reads_these(package):
    cost = measured()
    one, chunk = batch([4000] * 64), batch([4000] * 64, (1,) * 64)
    assert attention_ms(cost, chunk) >= attention_ms(cost, one) * 0.999


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=5),
    st.integers(0, 20_000),
    st.sampled_from([None, 128, 1024]),
    st.booleans(),
)
def test_times_are_positive_and_grow_with_tokens_and_with_what_is_before_them(lengths, cached, window, chunked):
    tokens = np.array([16.0, 512.0, 4096.0])
    seen = Seen(window, chunked and window is not None)
    table = np.array([[1e-5 + n * 1e-9 * Seen().pairs(length) for length in tokens] for n in (1, 8)])
    longest = np.inf if window is None else float(window)
    prompts = MeasuredPrompts(Grid(([1.0, 8.0], tokens), table), seen, 1e-9, 0.0, longest)
    said = []

    def seconds(new, before):
        new = np.array(new)
        return prompts.seconds(new, new + before, lambda *what: said.append(what))

    first = seconds(lengths, 0)
    assert 0 < first <= seconds([n + 64 for n in lengths], 0) * (1 + 1e-9)
    assert first <= seconds(lengths, cached) * (1 + 1e-9) or chunked
    if window is None and len(lengths) == 1 and lengths[0] > 4096:
        # Beyond the longest measured prompt by the pairs that there are more.
        assert first == pytest.approx(table[0][-1] + 1e-9 * (seen.pairs(lengths[0]) - seen.pairs(4096)))
        assert said[0] == ("tokens of a prompt", lengths[0], 4096)


def test_beyond_the_measured_range_times_go_on_in_proportion_with_a_note(package):
    cost = measured()
    edge, beyond = batch([4096] * 256), batch([8192] * 256)
    assert attention_ms(cost, beyond) == pytest.approx(2 * attention_ms(cost, edge))
    attention_ms(cost, batch([4096] * 512))
    notes = [note for note in cost.notes if "extrapolated in proportion" in note]
    assert notes[0].startswith("context tokens of a decode: 8,192 is beyond the measured 4,096;")
    assert notes[1].startswith("decodes: 512 is beyond the measured 256;")


# -- experts, versions, and rows that may not be read ------------------------------------------------------------------


def test_the_distribution_of_tokens_over_experts_is_what_was_asked_for(package):
    name, step = "Qwen/Qwen3-30B-A3B", batch([1024] * 64)
    for skew, load, factor in ((None, "power law 1.01", 1), (1.01, "power law 1.01", 1), (0.0, "balanced", 0.5)):
        cost = measured(name, expert_skew=skew)
        assert cost.explain(step)["experts"] == pytest.approx(48 * experts_ms(64) * factor * 1e-3)
        assert f"routed experts ({load} load)" in cost.notes[0]
    # Not in these tables: nothing else stands in for it unsaid.
    cost = measured(name, expert_skew=1.2)
    assert cost.explain(step)["experts"] == pytest.approx(roofline(name).explain(step)["experts"])
    assert "8 of 128 experts" in cost.notes[-1]
    with pytest.raises(
        CostError, match=r"cost: measured: experts were measured at an expert_skew of 0, 1.01, 1.2, not 0.5"
    ):
        measured(name, expert_skew=0.5)


def test_an_operator_that_the_nearest_version_lacks_is_of_the_next_and_the_note_says_which(package):
    write_table(package, "moe", "0.19.0")
    write_table(package, "moe", "0.24.0", num_experts=64)
    cost = measured("Qwen/Qwen3-30B-A3B")
    assert cost.explain(batch([1024] * 64))["experts"] == pytest.approx(48 * experts_ms(64) * 1e-3)
    older = next(note for note in cost.notes if "vllm 0.19.0" in note)
    assert older.endswith(": routed experts (power law 1.01 load)") and "the nearest to 0.33.0" in older


def test_products_timed_with_their_launches_are_read_under_the_other_engine_or_are_the_rooflines(package):
    write_table(package, "gemm", latency=0.06)
    step, shape = batch([1024] * 64), roofline()
    cost = measured()
    assert cost.explain(step)["projections"] == pytest.approx(shape.explain(step)["projections"])
    assert "products of the MLP in bf16" in cost.notes[-1]
    write_table(package, "gemm", "0.5.14", engine="sglang")
    cost = measured()
    assert cost.explain(step)["qkv_proj"] == pytest.approx(28 * product_ms(64, 4096, 1024) * 1e-3)
    assert "cost: measured on h100_sxm under sglang 0.5.14 (aiconfigurator-core): matrix products" in cost.notes
    # What an engine was not measured with at all is no matter of launches.
    assert "products of the MLP in fp8" in measured(dtype="fp8").notes[-1]


def test_rows_that_may_not_be_read_are_made_of_those_beside_them(package):
    def keep(kind, table):
        assert "latency" in table
        return (table["m"] != 64).to_numpy() if kind == "gemm" else np.ones(len(table), bool)

    withheld = read_measured(request_of(), keep)
    curve = next(iter(withheld.kinds.values()))["qkv_proj"]
    assert 256 in curve.counts and 64 not in curve.counts
    between = product_ms(1, 4096, 1024) + (product_ms(256, 4096, 1024) - product_ms(1, 4096, 1024)) * 63 / 255
    assert curve.at(64) == pytest.approx(between * 1e-3)
    nothing = read_measured(request_of(), lambda kind, table: np.zeros(len(table), bool))
    assert not nothing.mixers and "matrix products" not in " ".join(nothing.notes)


def test_a_set_in_csv_is_read_as_the_package_is_with_router_and_shared_experts(tmp_path):
    name = "zai-org/GLM-4.5-Air"
    model = load_model(name)
    routed = model.routed
    assert (model.heads, model.kv_heads, routed.count, routed.per_token, routed.width) == (96, 8, 128, 8, 1408)
    shapes = {"num_heads": 96}
    experts = {"hidden_size": model.hidden, "inter_size": 1408}
    for kind, fixed in {"gemm": {}, **dict.fromkeys(ATTENTION, shapes), "moe": experts}.items():
        rows = [{"kernel_source": "any"} | row | fixed for row in rows_of(kind)]
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        (tmp_path / f"h100_sxm_vllm-0.24.0_{kind}.csv").write_text("\n".join(lines) + "\n")
    gpu = load_gpu("h100")
    cost = ProfileCost(read_profile(tmp_path, 1, model, gpu), model, gpu)
    parts = cost.explain(batch([1024] * 64))
    sparse = sum(model.moe_layers)
    assert model.layers - sparse == 1, "the first layer is dense"
    assert parts["experts"] == pytest.approx(sparse * experts_ms(64) * 1e-3)
    assert parts["router"] == pytest.approx(sparse * product_ms(64, 128, model.hidden) * 1e-3)
    shared = product_ms(64, 2 * 1408, model.hidden), product_ms(64, model.hidden, 1408)
    names = ("shared_experts.gate_up_proj", "shared_experts.down_proj")
    assert [parts[each] for each in names] == pytest.approx([sparse * each * 1e-3 for each in shared])
    assert parts["gate_up_proj"] == pytest.approx(product_ms(64, 2 * model.intermediate, model.hidden) * 1e-3)
    with pytest.raises(ProfileError) as error:
        read_profile(tmp_path, 2, model, gpu)
    assert "not in these tables: " in str(error.value) and "all-reduces over 2 GPUs" in str(error.value)


# -- the package -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="aiconfigurator-core is not installed")
@pytest.mark.parametrize(
    ("name", "engine", "layout"),
    [
        ("openai/gpt-oss-20b", "vllm-0.24.0", {}),
        ("meta-llama/Llama-2-7b-hf", "vllm-0.24.0", {}),
        ("Qwen/Qwen3.5-35B-A3B", "sglang-0.5.14", {}),
        ("deepseek-ai/DeepSeek-V3", "sglang-0.5.14", {"tp": 8}),
        ("deepseek-ai/DeepSeek-V3.2", "vllm-0.24.0", {"tp": 8}),
    ],
)
def test_steps_of_every_kind_of_attention_are_positive_and_grow(name, engine, layout):
    cost = measured(name, engine, **layout)
    steps = {
        "context": [batch([length] * 64) for length in (300, 1000, 4000, 16_000, 60_000)],
        "decodes": [batch([1000] * n) for n in (1, 16, 64, 200, 256, 512)],
        "prompts": [batch([length], (length,)) for length in (512, 1000, 4096, 16_000, 40_000)],
        "prefixes": [batch([512 + cached], (512,)) for cached in (0, 512, 5000, 60_000)],
        "mixed": [batch([4000] * n, (2000,)) for n in (1, 16, 64)],
    }
    for what, each in steps.items():
        times = [cost.forward(step) for step in each]
        # Measurements scatter, and a kernel for longer contexts may be the better one: by a few percent.
        assert times[0] > 0 and all(b > 0.97 * a for a, b in pairwise(times)), what


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="aiconfigurator-core is not installed")
@pytest.mark.parametrize(
    ("kind", "name", "engine", "layout", "row"),
    [
        (
            "generation_attention",
            "openai/gpt-oss-20b",
            "vllm-0.24.0",
            {},
            {
                "num_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "window_size": 128,
                "kv_cache_dtype": "bfloat16",
            },
        ),
        (
            "generation_mla",
            "deepseek-ai/DeepSeek-V3",
            "sglang-0.5.14",
            {"tp": 8},
            {"num_heads": 16, "kv_cache_dtype": "bfloat16"},
        ),
        (
            "mla_generation_module",
            "deepseek-ai/DeepSeek-V3",
            "vllm-0.24.0",
            {"tp": 8},
            {"num_heads": 16, "kv_cache_dtype": "bfloat16", "gemm_type": "fp8_block"},
        ),
        (
            "dsa_generation_module",
            "deepseek-ai/DeepSeek-V3.2",
            "vllm-0.24.0",
            {"tp": 8, "kv_dtype": "fp8"},
            {"num_heads": 16, "kv_cache_dtype": "fp8", "gemm_type": "fp8_block", "model": "deepseek-ai/DeepSeek-V3.2"},
        ),
    ],
)
def test_the_packages_own_rows_of_decodes_are_read_back(kind, name, engine, layout, row):
    want = request_of(name, engine, **layout)
    tables = find_tables(want.gpu, engine)
    itself = 0 if "module" in kind else 1
    wanted = [(column, "=", value) for column, value in {**row, "batch_size": 64, "step": 2048 - itself}.items()]
    rows = parquet.read_table(tables.file_of(kind), partitioning=None, filters=wanted)
    shortest = min(rows["latency"].to_pylist())
    mixers = read_measured(want).mixers
    found = [times for mixer, times in mixers.items() if "window_size" not in row or mixer.window == row["window_size"]]
    times = replace(found[0].decodes, of_requests=None)
    assert times.seconds(np.full(64, 2048), 64 * 2048.0, print) == pytest.approx(shortest * 1e-3)
