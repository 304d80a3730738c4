"""Models of the catalogue against published figures, what a configuration may say, and how much KV fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from backends.checkpoint.families import DEFAULTS
from backends.checkpoint.language_model import SIZES, SIZES_OF, sizes_within
from backends.simulated.catalogue.gpu_specs import CatalogueError, gpu_names, load_gpu
from backends.simulated.catalogue.model_specs import from_config, load_model, model_names
from backends.simulated.kv_memory import ModelDoesNotFit, kv_capacity
from workbench.cluster.resolve import resolve
from workbench.scheduler.config import ConfigError
from workbench.settings.loading import settings_from

PUBLISHED = {
    # Total and active, in billions, as their makers state them: from memory, no card or report was opened for them.
    "HuggingFaceTB/SmolLM2-135M-Instruct": (0.1345, 0.1345),
    "Qwen/Qwen2.5-72B-Instruct": (72.7, 72.7),
    "Qwen/Qwen2.5-7B-Instruct": (7.62, 7.62),
    "Qwen/Qwen3-0.6B": (0.596, 0.596),
    "Qwen/Qwen3-1.7B": (1.72, 1.72),
    "Qwen/Qwen3-14B": (14.8, 14.8),
    "Qwen/Qwen3-235B-A22B": (235, 22),
    "Qwen/Qwen3-235B-A22B-FP8": (235, 22),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-32B": (32.8, 32.8),
    "Qwen/Qwen3-4B": (4.02, 4.02),
    "Qwen/Qwen3-8B": (8.19, 8.19),
    "deepseek-ai/DeepSeek-V3": (671, 37),
    "meta-llama/Llama-2-7b-hf": (6.74, 6.74),
    "meta-llama/Llama-3.1-405B": (405.9, 405.9),
    "meta-llama/Llama-3.1-70B": (70.55, 70.55),
    "meta-llama/Llama-3.1-8B": (8.03, 8.03),
    "meta-llama/Llama-3.2-1B": (1.24, 1.24),
    "meta-llama/Llama-3.2-3B": (3.21, 3.21),
    "mistralai/Mistral-7B-v0.1": (7.24, 7.24),
    "mistralai/Mistral-Nemo-Instruct-2407": (12.25, 12.25),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "openai/gpt-oss-120b": (116.83, None),
    "openai/gpt-oss-20b": (20.91, None),
}
"""Active parameters of gpt-oss are published without its embeddings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    model, (billions, active_billions) = load_model(name), PUBLISHED[name]
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    if active_billions is not None:
        assert model.active_parameters / 1e9 == pytest.approx(active_billions, rel=0.02)


def test_every_model_of_the_catalogue_has_a_published_count():
    beside = json.loads((Path(__file__).parent / "model_families.json").read_text())
    assert set(PUBLISHED) | set(beside) == set(model_names())


DATA = Path(__file__).parents[2].parent / "shared/data/model_configs"


@pytest.mark.skipif(not DATA.is_dir(), reason="the published configurations are not at hand")
def test_the_catalogue_says_what_the_published_configurations_say():
    for file in sorted(DATA.glob("*.json")):
        name = file.stem.replace("--", "/").replace("Meta-Llama", "Llama")
        found, known = load_model(str(file)), load_model(name)
        assert dataclasses.replace(found, name="", saved="") == dataclasses.replace(known, name="", saved="")
        assert found.precision().dtype == known.precision().dtype


OTHERS = {
    # What their published config.json says of the shape; fields that are left out there are left out here.
    "gemma2-9b": (
        9.24,
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "intermediate_size": 14336,
            "vocab_size": 256000,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma-7b": (
        8.54,
        {
            "model_type": "gemma",
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "intermediate_size": 24576,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
        },
    ),
    "gemma3-27b": (
        27.0,
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 5376,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "intermediate_size": 21504,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
    ),
    "gemma3-4b": (
        3.88,
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "num_hidden_layers": 34,
                "intermediate_size": 10240,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
    ),
    "gemma3-12b": (
        11.77,
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 3840,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "intermediate_size": 15360,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
    ),
    "deepseek-v2-lite": (
        15.7,
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "vocab_size": 102400,
            "max_position_embeddings": 163840,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "mistral-small-3.1-24b": (
        23.6,
        {
            "model_type": "mistral3",
            "vision_config": {"hidden_size": 1024},
            "text_config": {
                "model_type": "mistral",
                "hidden_size": 5120,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 32768,
                "vocab_size": 131072,
                "sliding_window": None,
                "max_position_embeddings": 131072,
            },
        },
    ),
    "phi-3-mini": (
        3.82,
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 32064,
            "sliding_window": 2047,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_configurations_that_leave_fields_out_have_the_published_counts(name):
    billions, config = OTHERS[name]
    assert from_config(config, name, "config.json").parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_windows_of_each_family_are_on_the_layers_that_have_them():
    gemma2, gemma3 = (from_config(OTHERS[name][1], name, "config.json") for name in ("gemma2-9b", "gemma3-27b"))
    assert gemma2.windows[:4] == (4096, None, 4096, None)
    assert gemma3.windows[:7] == (1024,) * 5 + (None, 1024)
    assert set(from_config(OTHERS["mistral-small-3.1-24b"][1], "", "config.json").windows) == {None}


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
@pytest.mark.slow
def test_what_a_left_out_field_means_is_what_transformers_takes_it_for(kind):
    configurations = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if kind not in configurations:
        assert not DEFAULTS[kind], "nothing is assumed where there is no class to assume it"
        return
    theirs = configurations[kind]()
    theirs.allow_global_per_layer_attribute_access = True
    for field in (*DEFAULTS[kind], "tie_word_embeddings"):
        if field in ("sliding_window", "max_window_layers"):  # absent, they are null there unless a switch is on
            continue
        assert getattr(theirs, field, False) == DEFAULTS[kind].get(field, False), field


@pytest.mark.parametrize("kind", sorted(SIZES_OF))
@pytest.mark.slow
def test_a_language_model_within_another_may_leave_out_every_size_that_its_class_has(kind):
    configurations = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    theirs = configurations[kind]().to_dict()
    assert sizes_within(kind, kind) == {name: theirs[name] for name in SIZES if theirs.get(name) is not None}


def test_a_language_model_within_another_is_read_where_the_file_says_least():
    def parameters(**text: object) -> int:
        return from_config({"model_type": "llava", "text_config": text}, "m", "config.json").parameters

    # Pixtral 12B has the heads and the MLP of its class, LLaVA 1.5 all but the vocabulary and the context.
    pixtral = {"num_hidden_layers": 40, "hidden_size": 5120, "head_dim": 128, "num_key_value_heads": 8}
    assert parameters(model_type="mistral", **pixtral, vocab_size=131_072) == 12_247_782_400
    assert parameters(model_type="llama", vocab_size=32_064, max_position_embeddings=4096) == 6_738_939_904
    with pytest.raises(CatalogueError, match=r"config\.json: hidden_size: missing"):
        from_config({"model_type": "llama", "vocab_size": 32_064}, "m", "config.json")


@pytest.mark.parametrize("field", ["text_config", "llm_config", "language_config"])
def test_what_is_said_inside_wins_over_what_is_said_outside_but_nothing_does_not(field):
    inner = dict(OTHERS["mistral-small-3.1-24b"][1]["text_config"])
    found = from_config(
        {
            "model_type": "x",
            "tie_word_embeddings": True,
            "vocab_size": 7,
            field: {**inner, "tie_word_embeddings": None, "sliding_window": None},
        },
        "m",
        "config.json",
    )
    assert found.tied_embeddings and found.vocab == 131_072
    whole = from_config({"model_type": "omni", "thinker_config": {"text_config": inner}}, "m", "config.json")
    assert whole.parameters == found.parameters + 131_072 * 5120


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"text_config": None}, None),
        ({"text_config": 3}, "config.json: text_config: 3 is not an object"),
        ({"num_key_value_heads": None}, None),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads: 3 does not divide 4 attention heads"),
        ({"num_key_value_heads": 8}, "config.json: num_key_value_heads: 8 does not divide 4 attention heads"),
        ({"hidden_size": 62}, "config.json: head_dim: missing, and hidden_size 62 is not a multiple of 4 heads"),
        ({"hidden_size": 62, "head_dim": 16}, None),
        ({"num_key_value_heads": "8"}, "config.json: num_key_value_heads: '8' is not a whole number"),
        ({"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings: 'yes' is not true or false"),
        ({"layer_types": 7}, "config.json: layer_types: 7 is not a list of texts"),
        ({"hidden_size": True}, "config.json: hidden_size: True is not a whole number"),
        ({"rope_scaling": "yarn"}, "config.json: rope_scaling: 'yarn' is not an object"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "factor: 'four' is not a number"),
        ({"model_type": None}, "config.json: model_type: missing"),
        ({"model_type": ["llama"]}, "config.json: model_type: ['llama'] is not a text"),
    ],
)
def test_any_value_gives_a_model_or_one_line_that_names_the_field(change, line):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        **change,
    }
    if line is None:
        assert from_config(config, "m", "config.json").kv_heads == 4
    else:
        with pytest.raises(CatalogueError, match=re.escape(line)):
            from_config(config, "m", "config.json")


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
    assert total == pytest.approx((model.parameters - model.all_vectors) * 2)


def test_an_8b_model_leaves_an_h100_about_400_thousand_tokens():
    budget = kv_capacity(load_model("Llama-3.1-8B"), load_gpu("h100"))
    assert 380_000 < budget.kv_tokens < 480_000


def test_a_model_that_does_not_fit_says_what_would():
    with pytest.raises(
        ModelDoesNotFit,
        match=r"70B in bf16 does not fit l4 .*; it fits with tp 8, or with --dtype fp8 and tp 4",
    ):
        kv_capacity(load_model("Llama-3.1-70B"), load_gpu("l4"))
    with pytest.raises(ModelDoesNotFit, match="no tensor parallel size of one node fits"):
        kv_capacity(load_model("Llama-3.1-405B"), load_gpu("l4"))


def test_a_folder_with_a_config_is_a_model(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path))
    assert (model.layers, model.kv_heads, model.head_dim) == (2, 4, 16)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "mamba"}, "config.json: model_type: 'mamba' is not supported"),
        ({"hidden_size": None}, "config.json: hidden_size: missing"),
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers: -1 is less than 1"),
    ],
)
def test_a_config_that_cannot_be_modelled_is_refused_by_field(change, line, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        **change,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogueError) as error:
        load_model(str(tmp_path))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kv_heads", "tp", "line"),
    [
        (6, 2, None),
        (6, 3, None),
        (2, 4, None),  # two GPUs hold the same head
        (6, 4, "tp: 4 does not divide the 6 KV heads of m"),
        (3, 2, "tp: 2 does not divide the 3 KV heads of m"),
        (6, 5, "tp: 5 does not divide the 12 attention heads of m"),
    ],
)
def test_heads_are_shared_out_over_gpus_as_the_real_runner_does(kv_heads, tp, line, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 768,
        "vocab_size": 100,
        "max_position_embeddings": 512,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    settings = settings_from(None, {"model": str(tmp_path / "m"), "tp": tp})
    if line is None:
        assert resolve(settings, "overlap").tp == tp
        return
    with pytest.raises(ConfigError) as error:
        resolve(settings, "overlap")
    assert str(error.value) == line


def test_a_window_of_qwen_is_off_unless_the_configuration_turns_it_on(tmp_path):
    config = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "sliding_window": 32,
        "max_window_layers": 0,
    }
    file = tmp_path / "config.json"
    for use, windows in ((None, (None, None)), (False, (None, None)), (True, (32, 32))):
        file.write_text(json.dumps(config | ({} if use is None else {"use_sliding_window": use})))
        assert load_model(str(file)).windows == windows
    # Only layers from max_window_layers on have it; left out, that is the 29th.
    file.write_text(json.dumps(config | {"use_sliding_window": True, "max_window_layers": 1}))
    assert load_model(str(file)).windows == (None, 32)
    del config["max_window_layers"]
    file.write_text(json.dumps({**config, "use_sliding_window": True, "num_hidden_layers": 30}))
    assert load_model(str(file)).windows == (None,) * 28 + (32, 32)


def test_a_layer_that_is_not_attention_is_refused_by_name(tmp_path):
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "layer_types": ["linear_attention", "full_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CatalogueError, match=r"config\.json: .*layer_types: 'linear_attention' is not supported"):
        load_model(str(tmp_path / "config.json"))
