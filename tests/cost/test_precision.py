"""What a checkpoint's weights are held in: from its configuration, unless the user says otherwise."""

from __future__ import annotations

import json

import pytest

from backends.checkpoint.precision import PARTS
from backends.simulated.catalogue.gpu_specs import CatalogueError, load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, from_config, load_model
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.kv_memory import ModelDoesNotFit, kv_capacity
from tests.cost.test_roofline import batch
from workbench.cluster.resolve import resolve
from workbench.settings.loading import settings_from

SHAPE = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "float16",
}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}


def model(**quantisation: object) -> ModelSpec:
    return from_config({**SHAPE, "quantization_config": quantisation}, "m", "config.json")


def compressed(
    weights: dict[str, object], inputs: dict[str, object] | None = None, **more: object
) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}


KNOWN = {
    # dtype, bytes a weight with its scales, computed in
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "int4", 0.5 + 2.5 / 128, "fp16"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "int4", 0.5 + 2.5 / 32, "fp16"),
    "gptq by column": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1, "fp16"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "int3", 3 / 8 + 2.375 / 128, "fp16"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8", 1, "fp8"),
    "fp8 by block": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 1 + 4 / 128**2, "fp8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "fp8", 1, "fp8"),
    "bitsandbytes of 4 bits": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", 0.5 + 4 / 64, "fp16"),
    "bitsandbytes, scales quantised": (
        {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        "int4",
        0.5 + 1 / 64 + 4 / (64 * 256),
        "fp16",
    ),
    "bitsandbytes of 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8", 1, "int8"),
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4", 0.5 + 1 / 32, "fp16"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 0.5 + 1 / 16, "fp4"),
    "modelopt, nested": ({"producer": {}, "quantization": {"quant_algo": "FP8"}}, "fp8", 1, "fp8"),
    "compressed w4a16": (compressed(INT4_WEIGHTS), "int4", 0.5 + 2 / 128, "fp16"),
    "compressed w8a8": (
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 8, "type": "float"}),
        "fp8",
        1,
        "fp8",
    ),
    "compressed int8": (
        compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "int"}),
        "int8",
        1,
        "int8",
    ),
    "modelopt by channel": ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8", 1, "fp8"),
    "modelopt by block": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "fp8", 1 + 4 / 128**2, "fp8"),
    "sglang w8a8": ({"quant_method": "w8a8_int8"}, "int8", 1, "int8"),
    "compressed nvfp4": (
        compressed({"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float"}),
        "nvfp4",
        0.5 + 1 / 16,
        "fp4",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_quantisation_decides_bytes_and_what_is_computed_in(name):
    config, dtype, size, computes = KNOWN[name]
    weights = model(**config).precision()
    assert (weights.dtype, weights.quantised.computes) == (dtype, computes)
    assert weights.bytes_of("mlp") == pytest.approx(size)
    assert weights.bytes_of("head") == 2 and weights.plain.computes == "fp16"
    assert weights.said_by == f"quantization_config ({config.get('quant_method', 'modelopt')})"


def test_nvfp4_is_four_bits_and_a_scale_for_16_weights_but_for_the_head_whoever_says_so():
    said, read = model().precision("nvfp4"), model(quant_method="modelopt", quant_algo="NVFP4").precision()
    assert said.quantised == read.quantised and said.bytes_of("experts") == 0.5625
    assert said.bytes_of("head") == 2 and said.plain.computes == "bf16"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "aqlm"}, "quantization_config: quant_method 'aqlm' is not modelled"),
        ({"bits": 4}, "quantization_config: has no quant_method"),
        ({"quant_method": "awq", "bits": 5}, "quantization_config.bits: 5 is not supported"),
        ({"quant_method": "awq", "bits": "4"}, "quantization_config.bits: '4' is not a whole number"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "quantization_config.weight_block_size: 128 is not rows"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quantization_config.quant_algo: 'W4A8_AWQ' is not"),
        ({"quant_method": "awq", "w_bit": 5}, "quantization_config.w_bit: 5 is not supported; supported: 2, 3, 4, 8"),
        (compressed({**INT4_WEIGHTS, "num_bits": 6}), "config_groups.group_0.weights.num_bits: 6 is not supported"),
        (compressed(INT4_WEIGHTS, ignore=["re:(lm"]), "quantization_config: '(lm' is no regular expression: "),
        (compressed({**INT4_WEIGHTS, "type": "bool"}), "config_groups.group_0.weights.type: 'bool' of 4 bits"),
        (
            {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": ["self_attn.q_proj"]},
            "modules_in_block_to_quantize: ['self_attn.q_proj'] is not a list of lists of texts",
        ),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "quantization_config.dynamic: other"),
        ({"quant_method": "awq", "modules_to_not_convert": "head"}, "modules_to_not_convert: 'head' is not a list"),
    ],
)
def test_a_quantisation_that_is_not_known_is_refused_by_name_unless_the_user_says(config, says):
    found = model(**config)
    with pytest.raises(CatalogueError) as error:
        found.precision()
    assert str(error.value).startswith("config.json: ") and says in str(error.value)
    assert "--dtype says what to count its weights as" in str(error.value) and "\n" not in str(error.value)
    assert found.precision("int4").said_by == "--dtype"


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (["lm_head"], {"head": 1.0}),
        (["self_attn"], {"attention": 1.0, "head": 1.0}),
        (["model.layers.*.self_attn"], {"attention": 1.0, "head": 1.0}),
        (["re:.*self_attn.*", "re:.*mlp.gate$"], {"attention": 1.0, "head": 1.0}),
        (["model.layers.0", "model.layers.79.mlp.down_proj"], {"attention": 1 / 80, "mlp": (3 + 1) / 240, "head": 1.0}),
        # By weights: 64 of 64 + 8 + 8 + 64 heads.
        (["o_proj"], {"attention": 64 / 144, "head": 1.0}),
        (["gate"], {"head": 1.0}),
        (["vision_tower"], {"head": 1.0}),
    ],
)
def test_modules_that_are_left_out_keep_their_precision(pattern, kept):
    weights = model(quant_method="fp8", modules_to_not_convert=pattern).precision()
    mine = {
        part: weights.kept[part] for part in PARTS if part in weights.kept and part not in ("experts", "shared_experts")
    }
    assert mine == pytest.approx(kept)
    assert weights.bytes_of("attention") == pytest.approx(1 + kept.get("attention", 0))


def test_groups_of_different_kinds_are_counted_by_the_modules_that_they_name():
    fp4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": fp4, "input_activations": {"num_bits": 4, "type": "float"}},
        "group_1": {
            "targets": ["re:.*self_attn.*"],
            "weights": fp8,
            "input_activations": {"num_bits": 8, "type": "float"},
        },
    }
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head", "re:.*down_proj"]}
    weights = model(**said).precision()
    assert weights.dtype == "fp8 and nvfp4" and weights.bytes_of("attention") == 1 and weights.bytes_of("head") == 2
    assert weights.bytes_of("mlp") == pytest.approx((2 * 0.5625 + 2) / 3)
    assert weights.kept == pytest.approx({"mlp": 1 / 3, "head": 1})
    groups["group_1"]["weights"] = {**fp4, "group_size": 32, "num_bits": 4}
    assert model(**said).precision().dtype == "mxfp4 and nvfp4"
    said["ignore"] = ["re:("]
    with pytest.raises(CatalogueError, match=r"quantization_config: '\(' is no regular expression"):
        model(**said).precision()


def test_gptq_of_some_matrices_leaves_the_others_as_they_are():
    named = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], ["mlp.up_proj"]]
    weights = model(quant_method="gptq", bits=8, group_size=-1, modules_in_block_to_quantize=named).precision()
    assert (weights.bytes_of("attention"), weights.bytes_of("mlp")) == (1, pytest.approx(5 / 3))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            {"kv_cache_quant_algo": "NVFP4"},
            "quantization_config.kv_cache_quant_algo: 'NVFP4' is not modelled; known: FP8",
        ),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme: 'int' of 8 bits is not modelled"),
        ({"kv_cache_scheme": "fp8"}, "quantization_config.kv_cache_scheme: 'fp8' is not an object"),
        ({"kv_cache_quant_algo": 8}, "quantization_config.kv_cache_quant_algo: 8 is not a text"),
    ],
)
def test_scales_of_kv_that_are_not_modelled_are_said_where_they_are_asked_for(said, line, tmp_path):
    quantised = {"quant_method": "modelopt", "quant_algo": "FP8", **said}
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": quantised}))
    given = {"model": str(tmp_path), "gpu": "b200"}
    assert resolve(settings_from(None, given), "overlap").kv_dtype == "bf16"
    with pytest.raises(CatalogueError) as error:
        resolve(settings_from(None, {**given, "kv_dtype": "auto"}), "overlap")
    assert line in str(error.value) and str(error.value).endswith("; --kv-dtype says what to count KV as")


def test_an_unquantised_checkpoint_is_counted_as_it_was_saved():
    for said, dtype, size in (("float32", "fp32", 4), ("torch.bfloat16", "bf16", 2), (None, "bf16", 2)):
        found = from_config({**SHAPE, "torch_dtype": said}, "m", "config.json")
        assert found.precision().dtype == dtype
        assert found.weight_bytes(found.precision()) == pytest.approx(size * (found.parameters - found.all_vectors))
    assert "nothing" in found.precision().said_by


def test_a_70b_in_awq_fits_a_gpu_that_it_does_not_fit_in_16_bits(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    folder = tmp_path / "awq"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": awq}))
    built = resolve(settings_from(None, {"model": str(folder), "gpu": "h100"}), "overlap")
    assert built.weights.dtype == "int4" and built.kv_budget["weights_bytes"] < 40e9
    with pytest.raises(
        ModelDoesNotFit, match=r"it fits with tp 2, or with --dtype fp8, or with --dtype int4 \(fp16 is from --dtype\)"
    ):
        resolve(settings_from(None, {"model": str(folder), "gpu": "h100", "dtype": "fp16"}), "overlap")


def test_deepseek_v3_is_counted_in_fp8_and_gpt_oss_in_mxfp4():
    deepseek, oss = load_model("deepseek-ai/DeepSeek-V3"), load_model("openai/gpt-oss-120b")
    assert deepseek.weight_bytes(deepseek.precision()) == pytest.approx(673e9, rel=0.005)
    # Published: 60.8 GiB, attention, routers and embeddings in bf16.
    assert oss.weight_bytes(oss.precision()) / 2**30 == pytest.approx(60.8, rel=0.005)
    assert kv_capacity(oss, load_gpu("h100"), dtype=oss.precision()).kv_tokens > 10_000


def test_weights_of_four_bits_are_read_faster_and_multiplied_in_sixteen():
    plain, quantised = model(quant_method="awq", bits=4, group_size=128), load_gpu("h100")
    wide, narrow = (RooflineCost(plain, quantised, dtype=dtype) for dtype in ("fp16", plain.precision()))
    assert narrow.forward(batch([], [100])) < 0.4 * wide.forward(batch([], [100])), "decodes wait for weights"
    prompt = batch([(0, 4096)])
    assert narrow.explain(prompt)["mlp"] == pytest.approx(wide.explain(prompt)["mlp"], rel=0.02)


def test_fp8_is_computed_in_eight_bits_where_the_gpu_can():
    found = model(quant_method="fp8")
    for name, faster in (("h100", True), ("a100", False)):
        in_fp8 = RooflineCost(found, load_gpu(name), dtype=found.precision()).explain(batch([(0, 4096)]))["mlp"]
        in_fp16 = RooflineCost(found, load_gpu(name), dtype="fp16").explain(batch([(0, 4096)]))["mlp"]
        assert (in_fp8 < 0.9 * in_fp16) is faster
