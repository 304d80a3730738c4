"""Models whose projections are held in FP8: read as published, or quantised as they are loaded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.torch import fp8
from backends.torch.loader import load_config, load_model
from backends.torch.model_config import UnsupportedModel
from backends.torch.models.decoder import BadCheckpoint
from backends.torch.ops import load_ops
from backends.torch.parallel import Parallel
from tests.torch.tiny import Driver, make, prompts

OPS = load_ops("reference")
PROJECTION = re.compile(r"\.(?:[qkvo]|gate|up|down)_proj\.weight$")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def save(tensors, folder, config):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def published(tmp_path, block):
    """(a folder as publishers of FP8 models write it, a folder with the same weights dequantised)."""
    make("Qwen2ForCausalLM", tmp_path / "plain", **SIZES)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    how = fp8.Fp8(block, saved=True)
    quantised, dequantised = {}, {}
    for name, tensor in tensors_of(tmp_path / "plain").items():
        quantised[name] = dequantised[name] = tensor
        if PROJECTION.search(name):
            values, scales = fp8.quantise(tensor, how)
            rows = fp8.row_scales(scales, len(tensor), how)
            dequantised[name] = fp8.dequantise(values, rows, how.of(*tensor.shape)[1])
            quantised[name] = values
            if block is None:
                quantised[f"{name}_scale"] = scales.reshape(1)
                quantised[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
            else:
                quantised[f"{name}_scale_inv"] = scales
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
    if block is not None:
        said["weight_block_size"] = list(block)
    save(quantised, tmp_path / "fp8", {**config, "quantization_config": said})
    save(dequantised, tmp_path / "dequantised", config)
    return tmp_path / "fp8", tmp_path / "dequantised"


def load(folder, **options):
    return load_model(str(folder), device="cpu", ops=OPS, **options)


def run(model):
    inputs = prompts()
    return Driver([model], len(inputs)).generate(inputs, 8)


@pytest.mark.parametrize("block", [None, (32, 32), (128, 64)])
def test_a_published_checkpoint_computes_what_its_dequantised_weights_do(block, tmp_path):
    quantised, dequantised = published(tmp_path, block)
    model, config = load(quantised)
    assert config.fp8 == fp8.Fp8(block, saved=True) and config.dtype == torch.float32
    expected, expected_logits = run(load(dequantised)[0])
    outputs, logits = run(model)
    assert outputs == expected
    for mine, theirs in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [None, (32, 32)])
@pytest.mark.parametrize("saved", [True, False])
def test_two_ranks_hold_the_halves_of_the_same_weights(block, saved, tmp_path):
    quantised, _ = published(tmp_path, block)
    source, options = (quantised, {}) if saved else (tmp_path / "plain", {"fp8": True})
    whole = load(source, **options)[0].layers[0]
    ranks = [load(source, parallel=Parallel(tp=2, tp_rank=rank), **options)[0].layers[0] for rank in (0, 1)]

    def weight(linear):
        held = linear.weight
        return fp8.dequantise(held.values, held.scales, held.scale_columns)

    down = torch.cat([weight(rank.mlp.down) for rank in ranks], dim=1)
    assert torch.equal(down, weight(whole.mlp.down))
    gates = [weight(rank.mlp.gate_up).chunk(2) for rank in ranks]
    both = torch.cat([part for parts in zip(*gates, strict=True) for part in parts])
    assert torch.equal(both, weight(whole.mlp.gate_up))


def test_weights_quantised_on_loading_stay_near_the_plain_ones_in_half_the_memory(tmp_path):
    make("LlamaForCausalLM", tmp_path, **SIZES)
    plain, _ = load(tmp_path, dtype=torch.bfloat16)
    rounded, config = load(tmp_path, dtype=torch.bfloat16, fp8=True)
    assert config.fp8 == fp8.Fp8()
    (_, near), (_, far) = run(plain), run(rounded)
    for exact, approximate in zip(near, far, strict=True):
        # Prompts only: where greedy choices part, so do the inputs.
        exact, approximate = exact[:5].float(), approximate[:5].float()
        assert torch.nn.functional.cosine_similarity(exact, approximate, dim=-1).min() > 0.98
        assert not torch.equal(exact, approximate)
    held = [part for layer in rounded.layers for part in (layer.mlp.gate_up.weight, layer.attention.out.weight)]
    before = [part for layer in plain.layers for part in (layer.mlp.gate_up.weight, layer.attention.out.weight)]
    taken = sum(part.values.nbytes + part.scales.nbytes for part in held)
    assert taken < 0.55 * sum(part.values.nbytes for part in before)
    dummy, _ = load(tmp_path, fp8=True, load_format="dummy", dtype=torch.bfloat16)
    assert dummy.layers[0].mlp.down.weight.values.float().abs().max() == fp8.LARGEST


def test_what_is_not_such_a_checkpoint_is_refused(tmp_path):
    quantised, _ = published(tmp_path, (32, 32))
    config = json.loads((quantised / "config.json").read_text())

    def rewritten(**changes):
        said = {**config["quantization_config"], **changes}
        (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
        return str(quantised)

    for changes, message in (
        ({"weight_block_size": [32, 24]}, "weight_block_size: [32, 24] is not rows and columns"),
        ({"fmt": "e5m2"}, "fmt: 'e5m2' is not supported; supported: e4m3"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}, "leaves model.layers.0.mlp.up_proj unquantised"),
        ({"quant_method": "gptq"}, "quantization_config: gptq is not supported"),
    ):
        with pytest.raises(UnsupportedModel, match=re.escape(message)):
            load_config(rewritten(**changes))
    with pytest.raises(UnsupportedModel, match="FP8 blocks of 128 columns cannot be split into shares of 64"):
        load(rewritten(weight_block_size=[128, 128]), parallel=Parallel(tp=2))
    (quantised / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(BadCheckpoint, match="is FP8, without a quantization_config that says so"):
        load(quantised)
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"is torch.float32; quantization_config says FP8 \(e4m3\)"):
        load(tmp_path / "plain")
    make("MixtralForCausalLM", tmp_path / "moe", num_local_experts=4)
    with pytest.raises(UnsupportedModel, match="FP8 is not supported for experts"):
        load(tmp_path / "moe", fp8=True)
