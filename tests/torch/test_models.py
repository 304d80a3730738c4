"""Every supported family computes what transformers computes."""

from __future__ import annotations

import pytest
import torch

from backends.torch.loader import load_model
from backends.torch.ops import load_ops
from tests.torch.tiny import Driver, make, prompts, reference

OPS = load_ops("reference")
NEW = 20
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama with biases everywhere": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 12}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {"head_dim": 32, "num_experts": 4, "norm_topk_prob": True, **MOE}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def check(architecture, changes, folder, page_size=16, chunk=8):
    theirs = make(architecture, folder, **changes)
    model, _ = load_model(str(folder), device="cpu", ops=OPS)
    inputs = prompts()
    driver = Driver([model], len(inputs), page_size=page_size)
    outputs, logits = driver.generate(inputs, NEW, chunk)
    for prompt, output, mine in zip(inputs, outputs, logits, strict=True):
        expected, expected_logits = reference(theirs, prompt, NEW)
        torch.testing.assert_close(mine, expected_logits[: len(mine)], atol=1e-4, rtol=1e-4)
        assert output == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_logits_and_greedy_tokens_equal_those_of_transformers(family, page_size, tmp_path):
    architecture, changes = FAMILIES[family]
    check(architecture, changes, tmp_path, page_size)
