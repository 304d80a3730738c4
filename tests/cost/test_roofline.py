"""The roofline: parts add up, more work never takes less time, and the figures are of the right size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.capture_sizes import default_capture_sizes
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables.profiles import read_profile
from tests.cost.profiles import DATA, needs_data
from workbench.scheduler.batch import ModelWorkerBatch


def batch(prefill: list[tuple[int, int]] = (), decode: list[int] = ()) -> ModelWorkerBatch:  # type: ignore[assignment]
    """``prefill``: (cached, new) tokens of each row; ``decode``: context after the step of each row."""
    lens = np.array([cached + new for cached, new in prefill] + list(decode), np.int64)
    new = np.array([n for _, n in prefill], np.int64)
    mode = "mixed" if len(prefill) and len(decode) else "prefill" if len(prefill) else "decode"
    return ModelWorkerBatch(
        0,
        mode,
        np.arange(len(lens)),
        0,
        lens,
        np.concatenate((new, np.ones(len(decode), np.int64))),
        len(prefill),
        len(lens),
        int(new.sum()),
        len(decode),
        int(lens.sum()),
        None,
        None,
        (),
        None,
        None,
        (),
        0,
        0,
        0,
    )


MODELS = [
    *("Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b", "Mistral-7B-v0.1"),
    *("deepseek-ai/DeepSeek-V3.2", "Qwen/Qwen3.5-27B", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
]
decodes = st.lists(st.integers(1, 20_000), min_size=1, max_size=40)
prefills = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000)), max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), prefills, decodes, st.sampled_from([(1, 1), (2, 1), (2, 2)]))
def test_the_parts_add_up_to_the_whole(name, prefill, decode, layout):
    cost = RooflineCost(load_model(name), load_gpu("h100"), tp=layout[0], pp=layout[1])
    for stage in range(layout[1]):
        for each in (batch(prefill, decode), batch([], decode)):
            assert cost.forward(each, stage) == pytest.approx(sum(cost.explain(each, stage).values()), rel=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), prefills, decodes, st.integers(1, 3000))
def test_more_work_never_takes_less_time(name, prefill, decode, more):
    # Without graphs: 5 decodes padded to 8 do take longer than the same 5 and a prompt of one token, which are not padded.
    cost = RooflineCost(load_model(name), load_gpu("h100"), capture_sizes=[])
    here = cost.forward(batch(prefill, decode))
    assert cost.forward(batch(prefill, [decode[0] + more, *decode[1:]])) >= here
    assert cost.forward(batch([*prefill, (0, more)], decode)) >= here


def test_decode_of_an_8b_model_takes_the_time_to_read_its_weights():
    gpu = load_gpu("h100")
    seconds = RooflineCost(load_model("Llama-3.1-8B"), gpu).forward(batch([], [1000]))
    weights = 8.03e9 * 2 / (gpu.memory_bandwidth * gpu.memory_efficiency)
    assert weights * 0.9 < seconds < weights * 1.25  # the embedding table is not read; kernels have overheads


def test_a_long_prefill_takes_the_time_of_its_arithmetic():
    gpu = load_gpu("h100")
    seconds = RooflineCost(load_model("Llama-3.1-8B"), gpu).forward(batch([(0, 8192)]))
    arithmetic = 2 * 7.5e9 * 8192 / (gpu.bf16_flops * gpu.compute_efficiency)
    assert arithmetic < seconds < arithmetic * 1.4


def test_decode_batches_cost_what_their_graph_costs():
    cost = RooflineCost(load_model("Llama-3.1-8B"), load_gpu("h100"), capture_sizes=default_capture_sizes(64))
    eight, five = (cost.explain(batch([], [800 // count] * count)) for count in (8, 5))
    attention = (eight.pop("attention"), five.pop("attention"))
    assert five == eight, "padded to 8"
    assert attention[1] < attention[0] < 1.05 * attention[1], "same context in all, fewer requests"


def test_a_sliding_window_bounds_what_attention_reads():
    cost = RooflineCost(load_model("mistralai/Mistral-7B-v0.1"), load_gpu("h100"))
    at_window, beyond = (cost.explain(batch([], [n] * 8))["attention"] for n in (4096, 16_000))
    assert beyond == pytest.approx(at_window)


@pytest.mark.parametrize("name", MODELS)
def test_the_decodes_ahead_are_the_same_steps_to_the_last_bit(name):
    cost, lens = RooflineCost(load_model(name), load_gpu("h100")), [17, 400, 4090, 9000]
    ahead = cost.decodes(batch([], lens), 20)
    if ahead is None:
        chosen = cost.model.mla is not None and cost.model.mla.topk is not None
        assert chosen or any(cost.model.windows), "only a window, and a choice of tokens, needs each context"
        return
    assert ahead == [cost.forward(batch([], [n + step for n in lens])) for step in range(20)]


@needs_data
@pytest.mark.parametrize(("gpu", "most"), [("a100", 0.12), ("h100", 0.06), ("h200", 0.07)])
@pytest.mark.slow
def test_whole_steps_are_near_the_sum_of_their_measured_operators(gpu, most):
    model, card = load_model("meta-llama/Llama-3.1-8B"), load_gpu(gpu)
    measured = ProfileCost(read_profile(DATA / "profiles/aiconfigurator", 1, model, card), model, card)
    modelled = RooflineCost(model, card, capture_sizes=[])
    steps = [batch([], [1024] * n) for n in (1, 16, 64, 128, 256)]
    steps += [batch([(0, n)]) for n in (512, 1024, 2048, 4096, 8192)]
    errors = [abs(modelled.forward(step) / measured.forward(step) - 1) for step in steps]
    assert sum(errors) / len(errors) < most, "docs/cost-model.md says how near"


def test_tensor_parallelism_pays_on_large_batches_and_costs_communication():
    model, gpu = load_model("Llama-3.1-70B"), load_gpu("h100")
    one, four = (RooflineCost(model, gpu, tp=tp) for tp in (1, 4))
    step = batch([], [1000] * 64)
    assert four.forward(step) < one.forward(step) / 2.5
    assert four.explain(step)["all_reduce"] > 0 == one.explain(step)["all_reduce"]


def test_weights_in_fp4_are_multiplied_in_16_bits_where_there_are_no_units_for_them():
    """As Marlin does on Hopper, whose FP8 units it does not use."""
    hopper, blackwell = load_gpu("h100"), load_gpu("b200")
    assert hopper.flops_for("fp4") == hopper.bf16_flops < hopper.fp8_flops
    assert hopper.product_rates("fp4", 0.5625) == hopper.product_rates("bf16", 0.5625)
    assert blackwell.flops_for("fp4") == blackwell.fp4_flops
    cost = RooflineCost(load_model("meta-llama/Llama-3.1-8B"), hopper, dtype="nvfp4")
    assert cost.notes == ["h100 has no units for products in fp4: they are counted in 16 bits"]
