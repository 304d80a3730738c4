"""Costs out of published operator tables: what is found for a run, what is looked up, and what is the roofline's."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import compute, parquet
from typer.testing import CliRunner

from backends.simulated.build_cost import build_cost
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.communication import all_reduce_s
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables import published_package
from tests.cost.profiles import batch
from tests.cost.published import (
    decode_ms,
    experts_ms,
    gather_ms,
    product_ms,
    prompt_ms,
    reduce_ms,
    rows_of,
    write_package,
    write_table,
)
from workbench.cli.app import app
from workbench.cluster.resolve import resolve
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.settings.loading import settings_from

ROOT = Path(__file__).resolve().parents[2]
SMALL, LAYERS = "Qwen/Qwen3-0.6B", 28
ENGINE = "vllm-0.33.0"


class Hidden:
    """A finder of modules that refuses the package, as tools that isolate imports have it."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == published_package.PACKAGE:
            raise ModuleNotFoundError(name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of tables in place of whatever is installed."""
    monkeypatch.syspath_prepend(write_package(tmp_path))
    return tmp_path


def request_of(
    name: str = SMALL, engine: str = ENGINE, gpu: str = "h100", dtype: str = "auto", **more: int
) -> CostRequest:
    model = load_model(name)
    return CostRequest(model, load_gpu(gpu), weights=model.precision(dtype), engine=engine, **more)


def measured(*args: str, **more: int) -> ProfileCost:
    cost = build_cost("measured", None, request_of(*args, **more))
    assert isinstance(cost, ProfileCost)
    return cost


def roofline(name: str = SMALL, **more: int) -> RooflineCost:
    return RooflineCost(load_model(name), load_gpu("h100"), capture_sizes=[], **more)


def attention_s(cost: ProfileCost, step: ModelWorkerBatch) -> float:
    """Seconds of one layer, where all have the same."""
    return cost.explain(step)["attention"] / cost.model.layers


def refused(**flags: str) -> str:
    with pytest.raises(ValueError) as error:
        resolve(
            settings_from(None, {"cost": "measured", "model": SMALL, "engine": "vllm", "gpu": "h100", **flags}),
            "overlap",
        )
    assert "\n" not in str(error.value)
    return str(error.value)


# -- look-ups ----------------------------------------------------------------------------------------------------------


def test_at_measured_points_an_operator_takes_what_was_measured(package):
    parts = measured().explain(batch([1024] * 64))
    for name, shape in {
        "qkv_proj": (4096, 1024),
        "o_proj": (1024, 2048),
        "gate_up_proj": (6144, 1024),
        "down_proj": (1024, 3072),
    }.items():
        assert parts[name] == pytest.approx(LAYERS * product_ms(64, *shape) * 1e-3), name
    assert parts["attention"] == pytest.approx(LAYERS * decode_ms(64, 1024) * 1e-3)
    assert attention_s(measured(), batch([2048], (2048,))) == pytest.approx(prompt_ms(2048) * 1e-3)


def test_between_measured_points_straight_lines_are_reproduced(package):
    cost = measured()
    assert attention_s(cost, batch([2000] * 100)) == pytest.approx(decode_ms(100, 2000) * 1e-3)
    # Half of its sides on each GPU: 2048 and 3072 columns lie between measured ones, in logarithms.
    parts = measured(tp=2).explain(batch([1024] * 100))
    assert parts["qkv_proj"] == pytest.approx(LAYERS * product_ms(100, 2048, 1024) * 1e-3)
    assert parts["gate_up_proj"] == pytest.approx(LAYERS * product_ms(100, 3072, 1024) * 1e-3)


def test_a_prompt_after_a_cached_prefix_takes_the_pairs_more(package):
    # The line between the two longest prompts: 1e-7 ms a pair.
    whole, after = (attention_s(measured(), batch([512 + cached], (512,))) for cached in (0, 1024))
    assert after - whole == pytest.approx(1e-7 * 512 * 1024 * 1e-3)


def test_all_reduces_are_looked_up_in_elements_as_graphs_run_them(package):
    cost = measured(tp=2)
    assert cost.reduce_s(1024) == pytest.approx((2 * LAYERS + 1) * reduce_ms(1024 * 1024) * 1e-3)


def test_the_best_of_several_kernels_counts(package):
    write_table(package, "gemm", latency=0.03)
    slow = measured().linear_s(64)
    file = write_table(package, "gemm")
    quick = measured().linear_s(64)
    both = parquet.read_table(file)
    twice = both.set_column(both.column_names.index("latency"), "latency", compute.multiply(both["latency"], 3.0))
    parquet.write_table(pyarrow.concat_tables([both, twice]), file)
    assert measured().linear_s(64) == quick < slow


def test_routed_experts_are_of_the_mildly_uneven_load_with_router_and_products_of_their_own(package):
    name = "Qwen/Qwen3-30B-A3B"
    parts = measured(name).explain(batch([1024] * 64))
    assert parts["experts"] == pytest.approx(48 * experts_ms(64) * 1e-3)
    # Narrower than any measured product.
    assert parts["router"] == pytest.approx(48 * product_ms(64, 128, 2048) * 1e-3)


def test_experts_in_fewer_bits_that_take_longer_than_in_16_are_of_another_version_or_the_rooflines(package):
    name, plain = "Qwen/Qwen3-30B-A3B", rows_of("moe")

    def write(version: str, dtype: str, share: float) -> None:
        there = [row | {"moe_dtype": dtype, "latency": row["latency"] * share} for row in plain]
        file = write_table(package, "moe", version=version)
        parquet.write_table(pyarrow.Table.from_pylist([*plain, *there]), file)

    write("0.19.0", "int4_wo", 1.5)
    slow = measured(name, "vllm-0.19.0", "h100", "int4")
    assert any("int4) with router and shared experts" in note for note in slow.notes if "by the roofline" in note)
    write("0.24.0", "int4_wo", 0.5)
    other = measured(name, "vllm-0.19.0", "h100", "int4")
    assert other.explain(batch([1024] * 64))["experts"] == pytest.approx(48 * 0.5 * experts_ms(64) * 1e-3)
    assert any("under vllm 0.24.0, the nearest to 0.19.0" in note and "routed experts" in note for note in other.notes)


def test_a_number_of_heads_between_two_measured_ones_is_between_their_times(package):
    for kind in ("context_attention", "generation_attention"):
        file = write_table(package, kind)
        rows = [
            {**row, "num_heads": heads, "latency": row["latency"] * heads / 16}
            for heads in (8, 12, 24, 32)
            for row in rows_of(kind)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    cost = measured()
    assert attention_s(cost, batch([1024] * 64)) == pytest.approx(decode_ms(64, 1024) * 1e-3, rel=0.01)
    assert attention_s(cost, batch([2048], (2048,))) == pytest.approx(prompt_ms(2048) * 1e-3, rel=0.01)
    assert "attention of decodes (16 heads between 12 and 24)" in cost.notes[0]


# -- the roofline in between -------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_the_rooflines_and_a_note_names_it(package):
    step = batch([1024] * 64)
    cost, shape = measured(), roofline()
    assert cost.explain(step)["elementwise"] == pytest.approx(shape.explain(step)["elementwise"])
    assert cost.explain(step)["sampler"] == pytest.approx(shape.explain(step)["sampler"])
    near, rest = cost.notes
    assert near.startswith("cost: measured on h100_sxm under vllm 0.24.0, the nearest to 0.33.0")
    assert near.endswith("attention of prompts, attention of decodes, matrix products")
    assert rest.endswith(
        "by the roofline, no table was read for them: norms, rotary and activations; embedding; sampler"
    )


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        ("generation_attention", "attention of decodes of 16 heads on 8 of KV of 128 in bf16"),
        ("context_attention", "attention of prompts of 16 heads on 8 of KV of 128 in bf16"),
        ("gemm", "products of the MLP in bf16"),
    ],
)
def test_heads_and_precisions_that_nobody_measured_fall_back_one_by_one(package, kind, operator):
    others = {"gemm": {"gemm_dtype": "nvfp4"}}.get(kind, {"num_heads": 12})
    write_table(package, kind, **others)
    cost, shape = measured(), roofline()
    assert operator in cost.notes[-1]
    decodes, prompt = batch([1024] * 64), batch([2048], (2048,))
    step = prompt if kind == "context_attention" else decodes
    if kind == "gemm":
        ours, theirs = cost.explain(step), shape.explain(step)
        assert all(ours[name] == pytest.approx(theirs[name]) for name in ("projections", "mlp", "lm_head"))
    else:
        assert cost.explain(step)["attention"] == pytest.approx(shape.explain(step)["attention"])
    assert attention_s(cost, decodes if kind == "context_attention" else prompt) > 0


def test_what_is_never_quantised_is_named_in_its_own_precision(package):
    write_table(package, "gemm", gemm_dtype="fp8")
    note = measured(dtype="fp8").notes[-1]
    assert "output head in bf16" in note and "in fp8" not in note, "there are products in fp8"


def test_a_link_that_is_said_takes_the_place_of_measured_collectives_and_so_do_nodes(package):
    write_table(package, "custom_allreduce")
    both = settings_from(None, {"cost": "measured", "model": SMALL, "engine": "vllm", "gpu": "h100", "tp": 2})
    known = resolve(both, "overlap").cost
    assert known.collectives_measured
    for flags, why in (
        ({"link": "16GB/s", "link_latency": "20us"}, "as they were said"),
        ({"nodes": 2}, "those between nodes, too"),
    ):
        recipe = resolve(dataclasses.replace(both, **flags), "overlap")
        assert not recipe.cost.collectives_measured
        assert f"links: {why}, in place of the measured collectives of another machine" in recipe.cost.notes
        assert recipe.cost.reduce_s(64) == pytest.approx(57 * all_reduce_s(64 * 1024 * 2, 2, recipe.gpu))
    assert known.reduce_s(64) == pytest.approx(57 * reduce_ms(64 * 1024) * 1e-3)


def test_without_a_table_of_all_reduces_or_experts_the_roofline_stands_in_for_these_alone(package):
    for file in package.rglob("*.parquet"):
        if file.name.startswith(("custom", "moe")):
            file.unlink()
    name = "Qwen/Qwen3-30B-A3B"
    cost, shape = measured(name, tp=2), roofline(name, tp=2)
    step = batch([1024] * 64)
    assert "all-reduces over 2 GPUs" in cost.notes[-1]
    assert "8 of 128 experts of 768 (tp 2, bf16) with router and shared experts" in cost.notes[-1]
    assert cost.explain(step)["experts"] == pytest.approx(shape.explain(step)["experts"])
    assert "router" not in cost.explain(step)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", "latent attention of 16 heads"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "linear attention of 32 heads"),
        ("mistralai/Mistral-7B-v0.1", "attention of decodes of 32 heads on 8 of KV of 128 in a window of 4096 in bf16"),
    ],
)
def test_layers_of_other_kinds_are_the_rooflines(package, name, words):
    cost, shape = measured(name), roofline(name)
    assert words in cost.notes[-1]
    for step in (batch([9000] * 8), batch([3000, 500, 600], (700,))):
        # None of their attention is in these tables.
        assert cost.explain(step)["attention"] == pytest.approx(shape.explain(step)["attention"])
        assert sum(cost.explain(step).values()) == pytest.approx(cost.forward(step))


def test_layers_with_and_without_a_window_are_told_apart(package):
    name = "openai/gpt-oss-20b"
    shapes = {"num_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    write_table(package, "context_attention", **shapes)
    write_table(package, "generation_attention", **shapes)
    cost, step = measured(name), batch([4096] * 64)
    # Twelve of 24 layers see 128 tokens: as many as a decode of 128 reads, where no such kernel was measured.
    assert cost.explain(step)["attention"] == pytest.approx(12 * (decode_ms(64, 4096) + decode_ms(64, 128)) * 1e-3)
    assert "in a window of 128 in bf16 (by attention to all tokens, at those that are seen)" in cost.notes[0]
    for kind in ("context_attention", "generation_attention"):
        rows = [
            row | {"latency": row["latency"] * factor, "window_size": window}
            for window, factor in ((0, 1), (128, 3))
            for row in rows_of(kind, **shapes)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), write_table(package, kind))
    cost = measured(name)
    # From two windows on a context is looked up as it is, for kernels of windows were measured at long ones, too.
    assert cost.explain(step)["attention"] == pytest.approx(12 * 4 * decode_ms(64, 4096) * 1e-3)
    assert "by attention to all tokens" not in cost.notes[0]


def test_stages_add_up_to_the_whole_model(package):
    whole, halves, step = measured(), measured(pp=2), batch([1024] * 64)
    assert halves.forward(step, 0) + halves.forward(step, 1) == pytest.approx(whole.forward(step))


def test_instances_that_share_experts_take_their_steps_together(package):
    write_table(package, "moe", moe_ep_size=2)
    write_table(package, "nccl", "2.27.3")
    write_table(package, "nccl", "2.23", latency=9.0)
    cost = measured("Qwen/Qwen3-30B-A3B", ep=2)
    step = batch([512], (512,))
    one, both = cost.group_forward([step, None]), cost.group_forward([step, step])
    # The tables count the tokens of all GPUs, of which each has half of the experts.
    assert cost.experts_s(1024) == pytest.approx(experts_ms(1024) * 1e-3)
    assert both - one > 48 * (experts_ms(1024) - experts_ms(513)) * 1e-3 * 0.99
    assert one > cost.linear_s(512) + 48 * experts_ms(513) * 1e-3
    # Their hidden states, and index and weight of 8 experts there, the hidden states back.
    there, back = (1024 * (2048 * 2 + 8 * 8) / 2, 1024 * 2048)
    assert cost.exchange_s([512, 512]) == pytest.approx((gather_ms(there) + gather_ms(back)) * 1e-3)
    assert "h100_sxm with NCCL 2.27.3 " in cost.notes[1] and cost.notes[1].endswith(": all-gathers, reduce-scatters")


def test_experts_that_were_not_measured_over_so_many_gpus_are_the_rooflines(package):
    cost, shape, step = measured("Qwen/Qwen3-30B-A3B", ep=2), roofline("Qwen/Qwen3-30B-A3B", ep=2), batch([1024] * 64)
    assert "8 of 128 experts of 768 (tp 1, ep 2, bf16) with router and shared experts" in cost.notes[-1]
    assert cost.explain(step)["experts"] == pytest.approx(shape.explain(step)["experts"])


# -- finding them ------------------------------------------------------------------------------------------------------


def test_each_kind_of_table_is_of_the_version_nearest_to_the_engines(package):
    write_table(package, "custom_allreduce", "0.19.0", latency=1.0)
    cost = measured(engine="vllm-0.19.0", tp=2)
    assert cost.reduce_s(1) == pytest.approx((2 * LAYERS + 1) * 1e-3)
    assert cost.notes[0].split("(")[0] == "cost: measured on h100_sxm under vllm 0.24.0, the nearest to 0.19.0 "
    assert cost.notes[1].split("(")[0] == "cost: measured on h100_sxm under vllm 0.19.0 "
    assert cost.notes[1].endswith(": all-reduces")


@pytest.mark.parametrize(
    ("wanted", "versions", "found"),
    [
        ("0.33.0", ["0.14.0", "0.19.0", "0.24.0"], "0.24.0"),
        ("0.19.0", ["0.14.0", "0.19.0", "0.24.0"], "0.19.0"),
        ("0.5.10.post1", ["0.5.9", "0.5.10", "0.5.12"], "0.5.10"),
        ("0.5.10", ["0.5.6.post2", "0.5.14"], "0.5.14"),
        ("0.9.1", ["1.0.0", "0.14.0"], "0.14.0"),
        ("1.0", [], None),
    ],
)
def test_the_nearest_version_is_by_its_numbers(wanted, versions, found):
    assert next(iter(published_package.by_nearness(wanted, versions)), None) == found


def test_what_cannot_be_had_is_refused_in_one_line_that_says_what_to_do(package, monkeypatch):
    write_table(package, "gemm", system="rtx_pro_6000_server")
    write_table(package, "gemm", system="l40s", engine="sglang")
    assert "has no tables of vllm on l4; it has h100, rtx-pro-6000" in refused(gpu="l4")
    assert "the engine 'workbench'" in refused(engine="workbench") and "--engine vllm or sglang" in refused(
        engine="workbench"
    )
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    assert refused().endswith('not installed: pip install "llm-workbench[profiles]"')
    monkeypatch.delitem(sys.modules, "aiconfigurator_core")
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    assert refused().endswith('not installed: pip install "llm-workbench[profiles]"')


def test_a_table_that_cannot_be_read_is_named_with_row_and_column_and_nothing_stands_in_for_it(package):
    file = write_table(package, "gemm", "0.33.0", latency=-1.0)
    assert refused() == f"{file}: row 1: latency: -1.0 is not a number of 0 or more"
    parquet.write_table(parquet.read_table(file).drop_columns(["k"]), file)
    assert refused() == f"{file}: no column 'k'"
    file.write_bytes(b"PAR1 and no more")
    assert refused().startswith(f"{file}: ")


def test_a_run_with_the_default_costs_is_told_of_the_tables_and_one_with_them_says_where_times_are_from(package):
    def run(out: str, *flags: str) -> tuple[str, str]:
        sample = str(ROOT / "traces/samples/sample.jsonl")
        words = ["simulate", sample, "--requests", "3", "--model", SMALL, "--gpu", "h100", "--out", str(package / out)]
        done = CliRunner().invoke(app, [*words, *flags])
        assert done.exit_code == 0, done.output
        return done.stderr, (package / out / "overlap/meta.json").read_text()

    line = "note: times are the roofline's estimates; operators of vllm measured on h100 are here: --cost measured\n"
    told, default = run("default", "--engine", "vllm")
    assert line in told and "are here" not in default
    assert line not in run("ours")[0] and line not in run("asked", "--engine", "vllm", "--cost", "roofline")[0]
    told, meta = run("measured", "--engine", "vllm", "--cost", "measured")
    assert line not in told and "cost: measured on h100_sxm under vllm 0.24.0" in meta


# -- the package -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec(published_package.PACKAGE) is None, reason="aiconfigurator-core is not installed"
)
def test_a_step_of_a_model_from_the_installed_tables_is_positive_grows_and_has_the_measured_rows():
    cost = measured("meta-llama/Llama-3.1-8B")
    steps = {
        "context": [batch([length] * 64) for length in (16, 300, 1000, 4000, 16_000, 60_000)],
        "decodes": [batch([1000] * n) for n in (1, 16, 64, 200, 256, 512)],
        "prompts": [batch([length], (length,)) for length in (128, 512, 1000, 4096, 16_000)],
        "prefixes": [batch([512 + cached], (512,)) for cached in (0, 512, 5000, 60_000)],
    }
    for name, each in steps.items():
        times = [cost.forward(step) for step in each]
        assert times[0] > 0 and times == sorted(times), name
    system = published_package.find_tables(load_gpu("h100"), ENGINE)
    version = system.version_of("generation_attention")
    file = system.system / "attention/vllm" / str(version) / "generation_attention_perf.parquet"
    wanted = {
        "batch_size": 64,
        "step": 1023,
        "num_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "window_size": 0,
    }
    rows = [
        row["latency"]
        for row in parquet.read_table(file, partitioning=None).to_pylist()
        if all(row[name] == value for name, value in wanted.items()) and row["kv_cache_dtype"] == "bfloat16"
    ]
    assert attention_s(cost, batch([1024] * 64)) == pytest.approx(min(rows) * 1e-3)
    assert "the nearest to 0.33.0" in cost.notes[0] and "matrix products" in cost.notes[0]
