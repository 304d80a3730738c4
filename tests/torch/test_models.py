"""Every supported family computes what transformers computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from backends.torch.layers import even_share, kv_head_share
from backends.torch.loader import load_model
from backends.torch.model_config import Fields, UnsupportedModel
from backends.torch.models import MODELS
from backends.torch.models.llama import LlamaForCausalLM
from backends.torch.ops import load_ops
from backends.torch.parallel import Parallel
from backends.torch.rotary import cos_sin_table
from tests.torch.tiny import COMMON, Driver, make, prompts, reference

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


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "a tied embedding": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "heads that do not add up to the hidden size": ("LlamaForCausalLM", {"head_dim": 24}),
    "one KV head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "as many KV heads as queries": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "another base": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama3 scaling": (
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
    "yarn scaling": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "yarn with mscale": (
        "Qwen3ForCausalLM",
        {"head_dim": 32, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "windows in some layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "windows by layer_types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "windows in a mixture": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 10}),
    "dense layers between mixtures": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 16, "num_experts": 8, "mlp_only_layers": [0], "decoder_sparse_step": 1, **MOE},
    ),
    "every second layer a mixture, weights not renormalised": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 16,
            "num_experts": 8,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            **MOE,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_transformers(variant, tmp_path):
    architecture, changes = VARIANTS[variant]
    check(architecture, changes, tmp_path)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_size_of_a_prompts_chunks_does_not_change_the_answer(chunk, tmp_path):
    check("LlamaForCausalLM", {}, tmp_path, page_size=4, chunk=chunk)


def test_two_stages_in_a_row_equal_the_whole_model(tmp_path):
    for name, changes in {"untied": {}, "tied": {"tie_word_embeddings": True}}.items():
        folder = tmp_path / name
        make("LlamaForCausalLM", folder, **changes)
        whole, _ = load_model(str(folder), device="cpu", ops=OPS)
        stages = [load_model(str(folder), device="cpu", ops=OPS, parallel=Parallel(pp=2, stage=i))[0] for i in (0, 1)]
        assert [len(stage.layers) for stage in stages] == [2, 1]
        inputs = prompts()
        expected, expected_logits = Driver([whole], len(inputs)).generate(inputs, NEW)
        outputs, logits = Driver(stages, len(inputs)).generate(inputs, NEW)
        assert outputs == expected
        for mine, theirs in zip(logits, expected_logits, strict=True):
            assert torch.equal(mine, theirs)


def test_a_stage_says_what_it_cannot_do(tmp_path):
    make("LlamaForCausalLM", tmp_path)
    first, last = (
        load_model(str(tmp_path), device="cpu", ops=OPS, parallel=Parallel(pp=2, stage=i))[0] for i in (0, 1)
    )
    with pytest.raises(ValueError, match=r"^stage 0 of 2 has no output projection$"):
        first.logits(torch.zeros(1, 64))
    driver = Driver([last], 1)
    with pytest.raises(ValueError, match=r"^stage 1 needs the hidden states of the stage before it$"):
        driver.run(driver.batch([(0, 0, [5])], []))


# Each is split over two ranks with something that does not divide: the vocabulary (201), or one KV head for both.
SPLIT = {
    "Llama": ("LlamaForCausalLM", {"vocab_size": 201, "attention_bias": True, "mlp_bias": True}),
    "Qwen2 with one KV head, tied": ("Qwen2ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {"head_dim": 32, "num_experts": 4, **MOE}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
}


def _rank(rank, folders, results, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for folder in folders:
            for load_format in ("auto", "dummy"):
                parallel = Parallel(tp=2, tp_rank=rank)
                model, _ = load_model(folder, device="cpu", ops=OPS, parallel=parallel, load_format=load_format)
                outputs, logits = Driver([model], 3).generate(prompts(), 8)
                results.put((folder, load_format, rank, outputs, [part.numpy() for part in logits]))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_for_checkpoints_and_for_dummy_weights(tmp_path):
    folders = []
    for i, (architecture, changes) in enumerate(SPLIT.values()):
        make(architecture, tmp_path / str(i), **changes)
        folders.append(str(tmp_path / str(i)))
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, folders, results, str(tmp_path / "rendezvous"))) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        found = [results.get(timeout=120) for _ in range(2 * 2 * len(folders))]
    finally:
        for process in ranks:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    expected = {}
    for folder in folders:
        for load_format in ("auto", "dummy"):
            model, _ = load_model(folder, device="cpu", ops=OPS, load_format=load_format)
            expected[folder, load_format] = Driver([model], 3).generate(prompts(), 8)
    for folder, load_format, _, outputs, logits in found:
        tokens, whole = expected[folder, load_format]
        assert outputs == tokens
        for mine, theirs in zip(logits, whole, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp"), [(8, 8, 4), (8, 4, 2), (8, 2, 2), (8, 2, 4), (8, 2, 8), (8, 1, 8)]
)
def test_every_rank_holds_the_kv_heads_that_its_queries_read(heads, kv_heads, tp):
    values = {"architectures": ["LlamaForCausalLM"], **COMMON}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaForCausalLM.read_config(Fields(values, "config.json"))
    for rank in range(tp):
        parallel = Parallel(tp=tp, tp_rank=rank)
        first, count = even_share(heads, parallel, "attention heads", config)
        first_kv, count_kv = kv_head_share(config, parallel)
        for local in range(count):
            assert first_kv + local // (count // count_kv) == (first + local) // (heads // kv_heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "4 attention heads cannot be split over 3 GPUs (tp)"),
        ({"num_attention_heads": 6, "head_dim": 16}, "2 KV heads cannot be shared by 3 GPUs (tp)"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 97},
            "97 elements of intermediate_size cannot be split over 3 GPUs (tp)",
        ),
    ],
)
def test_a_split_that_does_not_go_is_refused(changes, message, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], **COMMON, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel) as caught:
        load_model(str(tmp_path), device="cpu", ops=OPS, parallel=Parallel(tp=3), load_format="dummy")
    assert str(caught.value) == f"{tmp_path}/config.json: {message}"


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with its own factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 0.8,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn untruncated": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_tables_equal_those_of_transformers_to_the_last_bit(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**COMMON, "head_dim": 64, "max_position_embeddings": 2048, "rope_parameters": ROPES[kind]})
    positions = torch.arange(2048)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    fields = Fields({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, "config.json")
    ours = LlamaForCausalLM.read_config(fields)
    table = cos_sin_table(ours.rope, 64, 2048)
    assert torch.equal(table[:, :32], cos[0, :, :32])
    assert torch.equal(table[:, 32:], sin[0, :, :32])


def test_a_step_of_decodes_reads_nothing_back_from_the_device(tmp_path, monkeypatch):
    # What a CUDA graph cannot capture is a tensor turned into a Python value; the operators are the kernels' business.
    make("Qwen3MoeForCausalLM", tmp_path, head_dim=16, num_experts=4, **MOE)
    ops = ModuleType("ops")
    ops.__dict__.update(vars(OPS))
    model, _ = load_model(str(tmp_path), device="cpu", ops=ops)
    driver = Driver([model], 2)
    driver.run(driver.batch([(0, 0, [5, 6, 7]), (1, 0, [8, 9])], []))
    batch = driver.batch([], [(0, 3, 10), (1, 2, 11)])
    ops.decode_attention = lambda q, *_, **__: q
    ops.moe = lambda x, *_, **__: x
    for method in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, _forbidden(method))
    with torch.no_grad():
        hidden = model.forward(batch, driver.pools[0])
        logits = model.logits(hidden)
    monkeypatch.undo()
    assert logits.shape == (2, 200)


def _forbidden(method):
    def raises(*_, **__):
        raise AssertionError(f"Tensor.{method} waits for the device")

    return raises


def test_the_worked_example_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/models.md", "exec"), names)
    monkeypatch.setitem(MODELS, "GraniteForCausalLM", names["GraniteForCausalLM"])
    factors = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    }
    check("GraniteForCausalLM", factors, tmp_path)


@pytest.mark.parametrize("family", ["Llama with biases everywhere", "Qwen3-MoE"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_transformers_in_the_same_precision(family, dtype, tmp_path):
    architecture, changes = FAMILIES[family]
    theirs = make(architecture, tmp_path, **changes)
    model, config = load_model(str(tmp_path), device="cpu", ops=OPS, dtype=dtype)
    assert config.dtype == dtype
    (prompt,) = prompts((30,))
    driver = Driver([model], 1)
    logits = driver.run(driver.batch([(0, 0, prompt)], []))
    with torch.no_grad():
        exact = theirs(torch.tensor([prompt])).logits[0]
        rounded = theirs.to(dtype)(torch.tensor([prompt])).logits[0].float()
    # No farther from the float32 answer than twice what transformers' own rounding is.
    assert (logits - exact).norm() <= 2 * (rounded - exact).norm()
