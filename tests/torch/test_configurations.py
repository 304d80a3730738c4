"""What is read from a model's configuration, and the one line that is said when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backends.torch.loader import load_config
from backends.torch.model_config import Fields, UnsupportedModel
from backends.torch.models import MODELS, model_class
from tests.torch.checkpoints import says, write
from tests.torch.tiny import COMMON

REFUSED = {
    "an unknown architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        f"architectures: 'GPT2LMHeadModel' is not supported; supported: {', '.join(MODELS)}",
    ),
    "no architecture": ({"architectures": None}, "architectures: missing"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; supported: silu, swish"),
    "quantised weights": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config: gptq is not supported; use the unquantised weights",
    ),
    "linear attention": (
        {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
        "layer_types: 'linear_attention' is not supported; supported: full_attention, sliding_attention",
    ),
    "too few layer types": ({"layer_types": ["full_attention"]}, "layer_types: 1 entries for 3 layers"),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type: 'dynamic' changes the angles of cached keys as a sequence grows, which is not supported",
    ),
    "an unknown rope": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "rope_scaling.rope_type: 'longrope' is not supported; supported: default, linear, llama3, yarn",
    ),
    "a rope without its factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention: differs from layer to layer, which is not supported",
    ),
    "heads that are rotated in part": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor: other than 1 is not supported",
    ),
    "a missing size": ({"hidden_size": None}, "hidden_size: missing"),
    "a size of another type": ({"hidden_size": "64"}, "hidden_size: '64' is not a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is less than 1"),
    "KV heads that do not divide": (
        {"num_key_value_heads": 3},
        "num_key_value_heads: 3 does not divide 4 attention heads",
    ),
    "an odd head": ({"head_dim": 17}, "head_dim: 17 is odd; rotary embeddings need an even number"),
    "heads of no whole size": (
        {"num_attention_heads": 6},
        "head_dim: missing, and hidden_size 64 is not a multiple of 6 heads",
    ),
    "an unknown dtype": ({"dtype": "int8"}, "dtype: 'int8' is not supported; supported: float32, float16, bfloat16"),
    "an end that is no token": ({"eos_token_id": "</s>"}, "eos_token_id: '</s>' is not a token id or a list of them"),
    "more experts a token than there are": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok: 3, with 2 experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_is_not_supported_is_refused_in_one_line(case, tmp_path):
    changes, message = REFUSED[case]
    file = write(tmp_path, **changes)
    says(UnsupportedModel, lambda: load_config(str(tmp_path)), f"{file}: {message}")


def test_a_configuration_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=rf"^{re.escape(str(tmp_path))}/config\.json: line 1, column 2: "):
        load_config(str(tmp_path))


def test_a_configuration_may_begin_with_the_mark_of_utf_8_and_deep_nesting_is_refused(tmp_path):
    file = Path(write(tmp_path))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(str(tmp_path)).layers > 0
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(UnsupportedModel, match=rf"^{re.escape(str(file))}: is nested too deeply$"):
        load_config(str(tmp_path))


NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


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
LEFT_OUT = (
    "kv_heads",
    "head_dim",
    "rms_eps",
    "rope",
    "tie_word_embeddings",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "windows",
    "experts",
    "top_k",
    "renormalize",
    "expert_intermediate",
    "mixture",
)


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
