"""Catalogues against published figures, and how much KV fits."""

from __future__ import annotations

import json

import pytest

from backends.simulated.hardware import CatalogueError, gpu_names, load_gpu
from backends.simulated.memory import ModelDoesNotFit, kv_capacity
from backends.simulated.models import load_model, model_names


@pytest.mark.parametrize(
    ("name", "billions", "active_billions"),
    [
        ("meta-llama/Llama-3.1-8B", 8.03, 8.03),
        ("meta-llama/Llama-3.1-70B", 70.6, 70.6),
        ("Qwen/Qwen3-0.6B", 0.596, 0.596),
        ("Qwen/Qwen3-30B-A3B", 30.5, 3.3),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7, 12.9),
        ("deepseek-ai/DeepSeek-V3", 671, 37),
        ("openai/gpt-oss-20b", 20.9, None),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135, 0.135),
    ],
)
def test_parameter_counts_are_the_published_ones(name, billions, active_billions):
    model = load_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    if active_billions is not None:
        assert model.active_parameters / 1e9 == pytest.approx(active_billions, rel=0.02)


def test_every_catalogue_entry_loads_and_there_are_enough_of_them():
    assert len(model_names()) >= 15
    assert {"a100", "h100", "h200", "b200", "gb200", "l4", "l40s", "rtx-4090", "rtx-pro-6000", "mi300x"} <= set(
        gpu_names()
    )
    for name in model_names():
        assert load_model(name).parameters > 0
    for name in gpu_names():
        assert load_gpu(name).source


def test_kv_bytes_per_token_follow_the_attention_kind():
    llama = load_model("llama-3.1-8b-instruct")
    assert llama.kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2
    assert llama.kv_bytes_per_token(tp=2) == llama.kv_bytes_per_token() / 2
    assert llama.kv_bytes_per_token(tp=16) == llama.kv_bytes_per_token(tp=8), "8 KV heads are copied from there on"
    assert load_model("deepseek-ai/DeepSeek-V3").kv_bytes_per_token(tp=8) == 61 * (512 + 64) * 2


def test_sliding_windows_are_read_per_layer():
    assert load_model("openai/gpt-oss-20b").windows[:2] == (128, None)
    assert set(load_model("mistralai/Mistral-7B-v0.1").windows) == {4096}
    assert set(load_model("Qwen/Qwen2.5-7B-Instruct").windows) == {None}


def test_stages_share_the_weights_and_layers_out():
    model = load_model("Qwen/Qwen3-8B")
    layers = [layer for stage in range(5) for layer in model.stage_layers(5, stage)]
    assert layers == list(range(36))
    total = sum(model.weight_bytes("bf16", pp=5, stage=stage) for stage in range(5))
    assert total == pytest.approx(model.parameters * 2)


def test_an_8b_model_leaves_an_h100_about_400_thousand_tokens():
    budget = kv_capacity(load_model("Llama-3.1-8B"), load_gpu("h100"))
    assert 380_000 < budget.kv_tokens < 480_000


def test_a_model_that_does_not_fit_says_what_would():
    with pytest.raises(ModelDoesNotFit, match=r"70B in bf16 does not fit l4 .* GiB usable a GPU; it fits with tp 8"):
        kv_capacity(load_model("Llama-3.1-70B"), load_gpu("l4"))
    with pytest.raises(ModelDoesNotFit, match="no tensor parallel size of one node fits"):
        kv_capacity(load_model("Llama-3.1-405B"), load_gpu("l4"))


def test_a_folder_with_a_config_is_a_model(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path))
    assert (model.layers, model.kv_heads, model.head_dim) == (2, 4, 16)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "mamba"}, "config.json: model_type: 'mamba' is not supported"),
        ({"hidden_size": None}, "config.json: hidden_size: missing"),
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers: -1 is not a positive whole number"),
    ],
)
def test_a_config_that_cannot_be_modelled_is_refused_by_field(change, line, tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512, **change}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogueError) as error:
        load_model(str(tmp_path))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_gpu_file_is_checked_by_field(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("memory_bytes = 1e10\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\n")
    assert load_gpu(str(path)).name == "mine"
    path.write_text("memory_bytes = 1e10\nmemory_bandwith = 1e12\n")
    with pytest.raises(CatalogueError, match=r"mine.toml: memory_bandwith: no such field"):
        load_gpu(str(path))
    path.write_text("memory_bytes = 1e10\n")
    with pytest.raises(CatalogueError, match=r"mine.toml: memory_bandwidth: missing"):
        load_gpu(str(path))


def test_a_window_of_qwen_is_off_unless_the_configuration_turns_it_on(tmp_path):
    config = {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512, "sliding_window": 32,
    }  # fmt: skip
    file = tmp_path / "config.json"
    for use, windows in ((None, (None, None)), (False, (None, None)), (True, (32, 32))):
        file.write_text(json.dumps(config | ({} if use is None else {"use_sliding_window": use})))
        assert load_model(str(file)).windows == windows


def test_a_layer_that_is_not_attention_is_refused_by_name(tmp_path):
    config = {
        "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogueError, match=r"config\.json: .*layer_types: 'linear_attention' is not modelled"):
        load_model(str(tmp_path / "config.json"))


def test_a_gpu_that_reaches_what_another_does_takes_its_shares_and_keeps_its_own(tmp_path):
    mine = tmp_path / "mine.toml"
    facts = "memory_bytes = 1e9\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\n"
    mine.write_text(facts + 'reaches_like = "h200"\nexpert_efficiency = 0.4\n')
    found, like = load_gpu(str(mine)), load_gpu("h200")
    assert (found.kv_efficiency, found.attention_overhead_s, found.link_latency_s) == (
        like.kv_efficiency, like.attention_overhead_s, like.link_latency_s,
    )  # fmt: skip
    assert found.expert_efficiency == 0.4 and found.memory_bandwidth == 1e12 and found.multiprocessors == 0
    for relative in ('"h201"', "7"):
        mine.write_text(facts + f"reaches_like = {relative}\n")
        with pytest.raises(CatalogueError, match=r"mine\.toml: reaches_like: .* is not a GPU of the catalogue"):
            load_gpu(str(mine))
