"""Where a model's files are found, what is read from them, and the one line that is said when something is wrong."""

from __future__ import annotations

import json
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file

from backends.torch.loader import ModelNotFound, load_config
from backends.torch.model_config import UnsupportedModel
from backends.torch.models.decoder import BadCheckpoint
from backends.torch.parallel import Parallel
from tests.torch.checkpoints import load, rewrite, says, write
from tests.torch.tiny import VOCAB, make

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
    says(ModelNotFound, lambda: load(tmp_path), f"{shard}: missing, though model.safetensors.index.json names it")


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
