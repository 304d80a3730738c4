"""What steps of the families people deploy cost by the roofline: chunks, sparse attention, recurrences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from backends.checkpoint.layer_kinds import Attention
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, load_model
from backends.simulated.cost.models.roofline import RooflineCost
from tests.cost.families import CONFIGS, FAMILIES, family
from tests.cost.test_roofline import batch
from workbench.cluster.resolve import resolve
from workbench.settings.loading import settings_from


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_simulated(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = load_model(str(tmp_path))
    tp = next(size for size in (8, 4, 2, 1) if model.unsplit(size) is None)
    settings = settings_from(
        None, {"model": str(tmp_path), "gpu": "b200", "tp": tp, "dtype": "int4", "max_running": 16}
    )
    recipe = resolve(settings, "overlap")
    assert recipe.scheduler.kv_tokens > 10_000
    cost, mixed = recipe.cost, batch([(100, 3000), (0, 50)], [10_000, 5])
    assert cost.forward(mixed) == pytest.approx(sum(cost.explain(mixed).values()), rel=1e-12)
    few, many = (cost.forward(batch([], [4000] * count)) for count in (1, 16))
    assert 1e-4 < few <= many < 0.1


def roofline(name: str, **fields: object) -> RooflineCost:
    return RooflineCost(family(name, **fields), load_gpu("h200"), tp=1, capture_sizes=[])


def attention_s(cost: RooflineCost, *, prefill: list[tuple[int, int]] = (), decode: list[int] = ()) -> float:  # type: ignore[assignment]
    """Attention less what its launches take."""
    at = cost.stage(0)
    return at.attention_s(batch(prefill, decode)) - (at.prompt_overhead_s if prefill else at.attention_overhead_s)


def test_a_chunk_hides_what_is_before_it():
    name = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    cost = roofline(name, no_rope_layers=[1] * 48)
    whole_s, one_s, two_s = (attention_s(cost, decode=[8192 + more]) for more in (0, 1, 2))
    assert whole_s - one_s == pytest.approx(8191 * (two_s - one_s), rel=1e-6)
    assert attention_s(cost, decode=[100]) == pytest.approx(attention_s(cost, decode=[8192 * 3 + 100]))
    whole = attention_s(cost, prefill=[(0, 3 * 8192)])
    assert whole == pytest.approx(3 * attention_s(cost, prefill=[(0, 8192)]))
    # Two halves of a chunk are the whole of it, but for what is read twice.
    halves = attention_s(cost, prefill=[(0, 4096)]) + attention_s(cost, prefill=[(4096, 4096)])
    assert halves == pytest.approx(attention_s(cost, prefill=[(0, 8192)]), rel=0.05)


def test_pairs_of_windows_and_chunks_are_those_counted_one_by_one():
    from backends.simulated.cost.models.layer_times import _sawtooth, _triangle

    for length in (0, 1, 6, 7, 8, 20):
        at = np.array([length])
        assert _sawtooth(at, 7)[0] == sum(p % 7 + 1 for p in range(length))
        assert _triangle(at, 7)[0] == sum(min(p + 1, 7) for p in range(length))


def test_sparse_attention_reads_the_chosen_tokens_and_scores_all():
    cost = roofline("deepseek-ai/DeepSeek-V3.2")
    gpu = load_gpu("h200")
    bandwidth, scores = gpu.memory_bandwidth * gpu.latent_efficiency, gpu.fp8_flops * gpu.attention_efficiency
    chosen_s = 2048 * max(1152 / bandwidth, 2 * 128 * (576 + 512) / (gpu.bf16_flops * gpu.latent_flops_efficiency))
    scored_s = 100_000 * max(132 / bandwidth, 2 * 64 * 128 / scores)
    request_s = gpu.attention_head_overhead_s + 128 * (576 + 512) * 2 / bandwidth
    assert attention_s(cost, decode=[100_000]) == pytest.approx(61 * (chosen_s + scored_s + request_s), rel=1e-6)
    dense = roofline("deepseek-ai/DeepSeek-V3")
    assert attention_s(cost, decode=[100_000]) < attention_s(dense, decode=[100_000]) / 5
    # A short prompt is attended to as a dense one; a long one is not.
    extra_s = 61 * 2 * 64 * 128 * (1000 * 1001 / 2) / scores
    assert attention_s(cost, prefill=[(0, 1000)]) == pytest.approx(attention_s(dense, prefill=[(0, 1000)]) + extra_s)
    assert attention_s(cost, prefill=[(0, 120_000)]) < attention_s(dense, prefill=[(0, 120_000)]) / 2
    # Layers that take another's choice score nothing.
    shared, own = roofline("zai-org/GLM-5.2"), roofline("zai-org/GLM-5")
    assert attention_s(shared, decode=[100_000]) < attention_s(own, decode=[100_000])


def test_a_recurrence_costs_the_same_at_any_context_and_in_proportion_to_a_prompt():
    for name in ("Qwen/Qwen3.5-27B", "nvidia/Nemotron-H-56B-Base-8K"):
        model = family(name)
        only = next(layer for layer in model.stack if not isinstance(layer.mixer, Attention) and layer.mixer)
        cost = RooflineCost(
            ModelSpec("m", "m", model.hidden, model.vocab, 10**6, False, (only,) * 4),
            load_gpu("h200"),
            capture_sizes=[],
        )
        assert attention_s(cost, decode=[10]) == pytest.approx(attention_s(cost, decode=[100_000]))
        assert attention_s(cost, decode=[10] * 8) == pytest.approx(8 * attention_s(cost, decode=[10]))
        # A state is read and written once.
        state_s = 2 * cost.model.state_bytes() / (load_gpu("h200").memory_bandwidth * load_gpu("h200").kv_efficiency)
        assert state_s < attention_s(cost, decode=[10]) < 1.2 * state_s
        short, long = (attention_s(cost, prefill=[(0, count)]) for count in (10_000, 40_000))
        assert long == pytest.approx(4 * short, rel=0.02)
        # The steps ahead are known: no context matters.
        assert cost.decodes(batch([], [50, 60]), 3) == pytest.approx([cost.forward(batch([], [50, 60]))] * 3)


def test_steps_ahead_of_a_hybrid_are_the_steps_taken_one_by_one():
    cost = roofline("Qwen/Qwen3-Next-80B-A3B-Instruct", vocab_size=1000)
    ahead = cost.decodes(batch([], [1000, 2000]), 3)
    each = [sum(cost.explain(batch([], [1000 + step, 2000 + step])).values()) for step in range(3)]
    assert ahead == pytest.approx(each, rel=1e-12)
