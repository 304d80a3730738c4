"""What one GPU of a group holds of a model: which matrices are divided, and which are on every GPU."""

import pytest

from backends.checkpoint.layer_kinds import Experts
from backends.simulated.catalogue.model_specs import load_model


def held(name: str, **layout: int) -> float:
    """Elements, at 2 bytes each."""
    return load_model(name).weight_bytes("bf16", **layout) / 2


def test_shared_experts_are_divided_over_tp_and_routed_ones_over_all_that_share_them():
    name = "deepseek-ai/DeepSeek-V3"
    model = load_model(name)
    routed = [layer.mlp for layer in model.stack if isinstance(layer.mlp, Experts)]
    experts = sum(mlp.count * mlp.expert(model.hidden) for mlp in routed)
    # Eight instances of one GPU share routed experts and nothing else.
    assert held(name) - held(name, ep=8) == pytest.approx(experts * 7 / 8)
    shared = sum(mlp.shared(model.hidden) for mlp in routed)
    assert shared > 2.5e9, "58 layers of 3 x 7168 x 2048"


def test_every_gpu_has_the_router_and_what_has_no_heads():
    name = "deepseek-ai/DeepSeek-V3.2"
    # A router, and of latent attention what makes latents of hidden states, with the indexer: of 61 layers, 58 routers.
    router, latents = 7168 * 256, 7168 * (1536 + 512 + 64)
    indexer = 1536 * 64 * 128 + 7168 * 128 + 7168 * 64
    whole = 58 * router + 61 * (latents + indexer)
    assert held(name, tp=8) == pytest.approx((held(name) - whole) / 8 + whole)


def test_kv_heads_are_copied_where_there_are_fewer_than_gpus():
    name = "Qwen/Qwen3-30B-A3B"
    model, keys = load_model(name), 2048 * 4 * 128
    routers = model.layers * 2048 * 128
    # Four KV heads on eight GPUs: a head on each, twice the eighth.
    copies = model.layers * 2 * keys / 8
    assert held(name, tp=8) == pytest.approx((held(name) - routers) / 8 + routers + copies)
    assert held(name, tp=4) == pytest.approx((held(name) - routers) / 4 + routers)
