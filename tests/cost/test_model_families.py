"""Published configurations of the families people deploy: their parameters, layers and precision."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from backends.checkpoint.families import SAME_AS
from backends.checkpoint.layer_kinds import Attention, Experts, GatedDelta, Latent, Mamba2
from backends.simulated.catalogue.gpu_specs import CatalogueError
from backends.simulated.catalogue.model_specs import from_config, load_model
from tests.cost.families import CONFIGS, FAMILIES, family

# -- how many parameters -------------------------------------------------------------------------------------------------


def test_there_are_published_configurations_of_every_family():
    kinds = {CONFIGS[name].get("text_config", CONFIGS[name])["model_type"] for name in FAMILIES}
    assert len(FAMILIES) >= 60
    assert {SAME_AS.get(kind, kind) for kind in kinds} >= {
        *("llama", "llama4_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
        *("qwen3_5_moe_text", "mistral", "mixtral", "gemma2", "gemma3_text", "phi", "phi3", "phimoe", "glm4_moe"),
        *(
            "nemotron-nas",
            "step3p5",
            "glm_moe_dsa",
            "gpt_oss",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "minimax_m2",
            "nemotron_h",
        ),
    }


ROUNDED = {
    *("Qwen/Qwen3-8B", "codellama/CodeLlama-7b-hf", "deepseek-ai/DeepSeek-V2-Lite"),
    *("moonshotai/Kimi-K2-Instruct", "moonshotai/Kimi-K2.5"),
}
"""Models more than a hundredth off a figure that has one or two digits, and within half of its last."""


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_published_figure(name):
    known, found = FAMILIES[name], family(name)
    assert found.parameters == known["parameters"]
    digits, unit = known["published"][:-1], {"B": 1, "T": 1000}[known["published"][-1]]
    half = unit * 10 ** -len(digits.partition(".")[2]) / 2
    off = abs(found.parameters / 1e9 + known.get("beside_b", 0) - float(digits) * unit)
    assert off <= (half if name in ROUNDED else float(digits) * unit / 100)
    assert found.active_parameters <= found.parameters and found.all_vectors < found.parameters / 1000


def test_a_published_figure_has_the_address_it_was_read_at_or_is_said_to_be_from_memory():
    for name, known in FAMILIES.items():
        assert ("source" in known) != ("from_memory" in known), name
        assert known.get("source", "https://").startswith("https://"), name
        assert ("beside_b" in known) == ("beside" in known), name
    assert sum("source" in known for known in FAMILIES.values()) >= 46


@pytest.mark.slow
def test_parameters_are_those_of_transformers_on_the_meta_device():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    initialization = pytest.importorskip("transformers.initialization")
    configurations = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    found, expected = {}, {}
    for name in FAMILIES:
        values = {**CONFIGS[name], **CONFIGS[name].get("text_config", {})}
        for other in ("text_config", "quantization_config"):
            values.pop(other, None)
        kind = values.pop("model_type")
        if kind == "nemotron-nas":  # its class comes with the checkpoint
            continue
        shape = configurations[SAME_AS.get(kind, kind)](**values)
        with torch.device("meta"), initialization.no_init_weights():
            if kind.startswith(
                ("qwen3_vl", "step3p5")
            ):  # its class has the vision encoder; the language model's has no head
                if kind == "step3p5":
                    theirs = transformers.models.step3p7.modeling_step3p7.Step3p7TextModel(shape)
                else:
                    theirs = transformers.AutoModel.from_config(shape)
                head = 0 if values.get("tie_word_embeddings") else shape.vocab_size * shape.hidden_size
            else:
                theirs, head = transformers.AutoModelForCausalLM.from_config(shape), 0
        theirs.tie_weights()  # which initialising would have done
        expected[name] = head + sum(each.numel() for each in theirs.parameters())
        found[name] = family(name).parameters
    assert found == expected


# -- what layers they have -----------------------------------------------------------------------------------------------


def test_linear_attention_is_in_three_of_four_layers_and_keeps_a_state_instead_of_tokens():
    model = family("Qwen/Qwen3-Next-80B-A3B-Instruct")
    mixers = [layer.mixer for layer in model.stack]
    assert [type(each) for each in mixers[:4]] == [GatedDelta] * 3 + [Attention]
    assert mixers[3].gated and mixers[3].heads == 16 and mixers[3].kv_heads == 2
    # 12 layers with 2 heads of 256 for keys and as many for values.
    assert model.kv_bytes_per_token() == 12 * 2 * 2 * 256 * 2
    # 36 states of 32 heads of 128 x 128 in fp32, and 3 inputs of 8192 channels of their convolutions.
    assert model.state_bytes() == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert model.state_bytes(tp=4) == model.state_bytes() / 4


def test_a_pattern_of_letters_says_what_each_layer_of_nemotron_h_is():
    model = family("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    kinds = ["".join("M" if isinstance(layer.mixer, Mamba2) else "*" if layer.mixer else "E" for layer in model.stack)]
    assert kinds == ["MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"]
    assert all(layer.mixer is None or layer.mlp is None for layer in model.stack)
    assert model.kv_bytes_per_token() == 6 * 2 * 2 * 128 * 2
    latent = family("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4").routed
    assert latent == Experts(512, 22, 2688, 5376, gated=False, latent=1024)
    by_words = ["mamba", "moe", "mamba", "attention"]
    config = {**CONFIGS["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"], "num_hidden_layers": 4}
    del config["hybrid_override_pattern"]
    spelled = [from_config({**config, "layers_block_type": by_words}, "m", "c")]
    spelled.append(from_config({**config, "hybrid_override_pattern": "MEM*"}, "m", "c"))
    assert spelled[0].stack == spelled[1].stack


def test_every_fourth_layer_of_llama_4_sees_everything_and_every_second_of_maverick_has_experts():
    maverick = family("meta-llama/Llama-4-Maverick-17B-128E-Instruct")
    assert [layer.mixer.window for layer in maverick.stack[:5]] == [8192, 8192, 8192, None, 8192]
    assert all(layer.mixer.chunked == (layer.mixer.window is not None) for layer in maverick.stack)
    assert maverick.moe_layers[:4] == (False, True, False, True) and maverick.intermediate == 16384
    assert set(family("meta-llama/Llama-4-Scout-17B-16E-Instruct").moe_layers) == {True}


def test_sparse_attention_chooses_tokens_and_layers_that_share_a_choice_have_no_indexer():
    model, shared = family("deepseek-ai/DeepSeek-V3.2"), family("zai-org/GLM-5.2")
    assert {layer.mixer.topk for layer in model.stack} == {2048}
    # 576 elements in two bytes, and a key of 128 bytes with a scale of 4.
    assert model.kv_bytes_per_token() == 61 * (576 * 2 + 132)
    # In 8 bits: 512, four scales, 64 rotary elements in two bytes (the 656 bytes of FlashMLA), and the key.
    assert model.kv_bytes_per_token("fp8") == 61 * (656 + 132)
    own = [isinstance(layer.mixer, Latent) and layer.mixer.indexer is not None for layer in shared.stack]
    assert own[:8] == [True, True, True, False, False, False, True, False] and sum(own) == 21
    assert shared.kv_bytes_per_token() == 78 * 576 * 2 + 21 * 132


def test_a_searched_model_lacks_attention_in_some_layers_and_has_mlps_of_many_widths():
    model = family("nvidia/Llama-3_3-Nemotron-Super-49B-v1")
    assert sum(layer.mixer is None for layer in model.stack) == 31 and model.layers == 80
    # 2 / 3 of the multiplier times 8,192, up to the next 256.
    widths = Counter(layer.mlp.width for layer in model.stack)
    assert widths == {28672: 49, 14336: 6, 7168: 10, 5632: 8, 2816: 6, 17920: 1}
    assert model.kv_bytes_per_token() == 49 * 2 * 8 * 128 * 2
    blocks = [
        {"attention": {"n_heads_in_group": 16}, "ffn": {"no_op": True}},
        {"attention": {"no_op": True}, "ffn": {"no_op": True}},
        {"attention": {"no_op": True}, "ffn": {"intermediate_size": 512}},
    ]
    few = family("nvidia/Llama-3_3-Nemotron-Super-49B-v1", num_hidden_layers=3, block_configs=blocks)
    norms = [layer.vectors // 8192 for layer in few.stack]
    assert (few.kv_heads, few.intermediate, norms) == (4, 512, [1, 0, 1])


def test_windows_of_step_have_more_heads_and_all_heads_have_a_gate():
    model = family("stepfun-ai/Step-3.5-Flash")
    full, sliding = model.stack[0].mixer, model.stack[1].mixer
    assert (full.heads, full.window, sliding.heads, sliding.window) == (64, None, 96, 512)
    assert full.matrices(4096)["self_attn.g_proj"] == 4096 * 64 and sliding.kv_heads == full.kv_heads == 8
    assert model.moe_layers == (False,) * 3 + (True,) * 42 and model.drafting_layers == 3
    assert model.max_context == 262_144 and model.routed.shared_width == 1280


def test_heads_differ_by_layer_where_windows_have_heads_of_their_own():
    gemma, mimo = family("google/gemma-4-26B-A4B-it"), family("XiaomiMiMo/MiMo-V2-Flash")
    local, wide = gemma.stack[0].mixer, gemma.stack[5].mixer
    assert (local.window, local.kv_heads, local.head_dim) == (1024, 8, 256)
    assert (wide.window, wide.kv_heads, wide.head_dim, wide.keys_are_values) == (None, 2, 512, True)
    full, sliding = mimo.stack[0].mixer, mimo.stack[1].mixer
    assert (full.kv_heads, full.head_dim, full.value_dim, full.window) == (4, 192, 128, None)
    assert (sliding.kv_heads, sliding.window) == (8, 128)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai/DeepSeek-V3",
        "XiaomiMiMo/MiMo-V2-Flash",
        "google/gemma-4-26B-A4B-it",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ],
)
def test_layers_that_draft_are_told_and_not_counted(name):
    with_drafts, without = (family(name, num_nextn_predict_layers=count) for count in (1, 0))
    assert (with_drafts.drafting_layers, without.drafting_layers) == (1, 0)
    assert with_drafts.parameters == without.parameters and with_drafts.weight_bytes("bf16") == without.weight_bytes(
        "bf16"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("meta-llama/Llama-3.1-8B", None),
        ("Qwen/Qwen3-30B-A3B", None),
        ("mistralai/Mistral-7B-v0.1", "attends over sliding windows"),
        ("Qwen/Qwen3.5-27B", "has recurrent layers"),
        ("deepseek-ai/DeepSeek-V3.2", "has sparse attention over chosen tokens"),
    ],
)
def test_what_a_profile_cannot_hold_of_a_model_is_said_in_words(name, words):
    assert family(name).beyond_tables == words


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("Qwen/Qwen3-8B", {"model_type": "deepseek_v4"}, "model_type: 'deepseek_v4' is not supported; known: llama"),
        ("Qwen/Qwen3-8B", {"model_type": "kimi_linear"}, "model_type: 'kimi_linear' is not supported"),
        ("Qwen/Qwen3.5-27B", {"linear_num_key_heads": 7}, "linear_num_key_heads: 7 does not divide 48 value heads"),
        ("Qwen/Qwen3.5-27B", {"mamba_ssm_dtype": "int8"}, "mamba_ssm_dtype: 'int8' is not supported"),
        ("Qwen/Qwen3.5-27B", {"layer_types": ["sliding_attention"] * 64}, "layer_types: 'sliding_attention' is not"),
        ("nvidia/Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": "MX*"}, "hybrid_override_pattern: 'X' is not"),
        ("nvidia/Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": "M*"}, "2 entries for 118 layers"),
        ("nvidia/Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": None}, "hybrid_override_pattern: missing"),
        ("zai-org/GLM-5.2", {"indexer_types": ["shared"] * 78}, "indexer_types: not 'full' or 'shared' for each of 78"),
        ("zai-org/GLM-5", {"mlp_layer_types": ["dense"]}, "mlp_layer_types: not 'dense' or 'sparse' for each of 78"),
        ("deepseek-ai/DeepSeek-V3", {"kv_lora_rank": None}, "kv_lora_rank: missing"),
        (
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            {"moe_layers": "all"},
            "moe_layers: 'all' is not a list of layers",
        ),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", {"no_rope_layers": [1]}, "no_rope_layers: not an entry for each"),
        (
            "google/gemma-4-26B-A4B-it",
            {"hidden_size_per_layer_input": 256},
            "hidden_size_per_layer_input: 256 is not modelled",
        ),
        ("google/gemma-4-26B-A4B-it", {"num_kv_shared_layers": 18}, "num_kv_shared_layers: 18 is not modelled"),
        (
            "XiaomiMiMo/MiMo-V2-Flash",
            {"hybrid_layer_pattern": [2]},
            "hybrid_layer_pattern: not a 0 or a 1 for each of 48",
        ),
        ("microsoft/phi-2", {"qk_layernorm": True}, "qk_layernorm: True is not supported"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": None}, "block_configs: missing"),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": [{}]}, "block_configs: 1 entries for 80 layers"),
        (
            "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
            {"num_hidden_layers": 1, "block_configs": [{"attention": {"replace_with_linear": True}}]},
            "block_configs[0].attention.replace_with_linear: True is not modelled",
        ),
        (
            "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
            {"num_hidden_layers": 1, "block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": "x"}}]},
            "block_configs[0].ffn.ffn_mult: 'x' is not a number",
        ),
        ("stepfun-ai/Step-3.5-Flash", {"moe_layers_enum": "3,x"}, "moe_layers_enum: '3,x' is not a list of layers"),
        (
            "stepfun-ai/Step-3.5-Flash",
            {"layer_types": ["full_attention"] * 46},
            "layer_types: 46 entries for 45 layers",
        ),
        ("google/gemma-4-26B-A4B-it", {"top_k_experts": None}, "top_k_experts: missing"),
        ("openai/gpt-oss-20b", {"num_experts_per_tok": 33}, "num_experts_per_tok: 33, with 32 experts"),
    ],
)
def test_what_no_reader_knows_is_refused_by_field(name, fields, line):
    with pytest.raises(CatalogueError) as error:
        family(name, **fields)
    assert str(error.value).startswith("config.json: ") and line in str(error.value) and "\n" not in str(error.value)


# -- in what precision ---------------------------------------------------------------------------------------------------


def test_a_quantisation_leaves_out_what_it_names_as_each_family_names_it():
    def kept(name: str, *ignored: str, **fields: object) -> dict[str, float]:
        said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(ignored)}
        return {k: round(v, 3) for k, v in family(name, quantization_config=said, **fields).precision().kept.items()}

    qwen = "Qwen/Qwen3.5-397B-A17B"
    linear = kept(qwen, "model.language_model.layers.*.linear_attn*", "*.mlp.shared_expert.*")
    assert linear == {"recurrent": 1.0, "shared_experts": 1.0, "head": 1.0}
    assert kept(qwen, "model.language_model.layers.3.self_attn*") == {"attention": round(1 / 15, 3), "head": 1.0}
    nano = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert kept(nano, "backbone.layers.0.mixer.in_proj", "backbone.layers.5.mixer.q_proj") == {
        "recurrent": pytest.approx(1 / 23 * 10304 / 14400, abs=5e-4),
        "attention": pytest.approx(1 / 6 * 4096 / (2 * 4096 + 2 * 256), abs=5e-4),
        "head": 1.0,
    }
    assert kept("MiniMaxAI/MiniMax-M2.5", "model.layers.0.block_sparse_moe") == {
        "experts": round(1 / 62, 3),
        "head": 1.0,
    }
    assert kept("google/gemma-4-26B-A4B-it", "model.language_model.layers.*.mlp*") == {
        "shared_experts": 1.0,
        "head": 1.0,
    }
    # The latents of DeepSeek: by weights, not by matrices.
    names = [f"model.layers.*.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
    assert kept("deepseek-ai/DeepSeek-V3", *names)["attention"] == pytest.approx(0.372, abs=1e-3)


def test_a_checkpoint_that_is_quantised_in_several_ways_is_counted_by_module():
    def layer(number: int) -> dict[str, dict[str, str]]:
        name = f"model.language_model.layers.{number}"
        mlp = {f"{name}.mlp.{each}_proj": {"quant_algo": "W4A16_NVFP4"} for each in ("gate", "up", "down")}
        mixers = ("linear_attn.in_proj_qkv", "self_attn.q_proj")
        return mlp | {f"{name}.{each}": {"quant_algo": "FP8"} for each in mixers}

    layers = {name: algorithm for number in range(64) for name, algorithm in layer(number).items()}
    said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    weights = family("Qwen/Qwen3.5-27B", quantization_config=said).precision()
    assert weights.bytes_of("mlp") == 0.5625 and weights.bytes_of("head") == 2
    # Queries with gates, 12,288 of 12,288 + 1,024 + 1,024 + 6,144 columns and rows.
    assert weights.bytes_of("attention") == pytest.approx(2 - 12_288 / 20_480)
    assert {held.computes for _, held in weights.of("recurrent")} == {"fp8", "bf16"}
    assert weights.dtype == "nvfp4 a16 and fp8" and weights.described["mixed"]["mlp"] == [[1.0, 0.5625, "bf16"]]
    said["quantized_layers"] = {"lm_head": {"quant_algo": "W2"}}
    with pytest.raises(CatalogueError, match=r"quantized_layers: lm_head: 'W2' is not modelled; known: NVFP4"):
        family("Qwen/Qwen3.5-27B", quantization_config=said).precision()


def test_precision_is_read_from_the_file_that_stands_beside_a_configuration(tmp_path):
    config = dict(CONFIGS["nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4"])
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path)).precision().dtype == "bf16"
    beside = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    found = load_model(str(tmp_path))
    assert found.precision().dtype == "nvfp4" and found.saved_kv == "fp8"
    assert found.precision("bf16").dtype == "bf16", "--dtype wins"
    own = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": own}))
    assert load_model(str(tmp_path)).precision().dtype == "fp8", "what the configuration says itself wins"
