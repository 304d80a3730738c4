"""How much KV fits beside the windows and the states of running requests, by the rules of engines."""

from __future__ import annotations

import json

import pytest

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.kv_memory import MemoryBudget, ModelDoesNotFit, kv_capacity
from backends.simulated.kv_windows import ALL, NEEDED, KvRoom, KvRule, kv_room
from tests.cost.families import CONFIGS, family
from workbench.cluster.resolve import resolve
from workbench.settings.engines import load_engine
from workbench.settings.loading import settings_from


def room(name: str, rule: KvRule, gib: float, *, running: int = 64, tp: int = 1, **fields: object) -> KvRoom:
    """What fits in so many GiB, with pages of 16 tokens and steps of 8,192."""
    model = family(name, **fields)
    return kv_room(
        model,
        rule,
        gib * 2**30,
        kv_dtype="bf16",
        tp=tp,
        pp=1,
        stage=0,
        max_running=running,
        max_context=model.max_context,
        step_tokens=8192,
        page_size=16,
    )


def engine_rule(name: str) -> KvRule:
    return KvRule(**load_engine(name).kv)


def test_the_preset_of_no_engine_keeps_every_token_as_before():
    assert engine_rule("workbench") == engine_rule("mini-sglang") == ALL
    for name in ("openai/gpt-oss-20b", "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-8B"):
        assert room(name, ALL, 10).tokens == int(10 * 2**30 // family(name).kv_bytes_per_token())


def test_exact_keeps_the_windows_of_running_requests_and_no_more():
    # 12 layers of gpt-oss-20b see everything, 12 the last 128 tokens; a token takes 2 KiB in each.
    found = room("openai/gpt-oss-20b", NEEDED, 10)
    windows = 64 * 128 * 12 * 2048
    assert found == KvRoom((10 * 2**30 - windows) // (12 * 2048), windows, 64)
    # Where there is less than the windows could hold, all layers hold what there is.
    assert room("openai/gpt-oss-20b", NEEDED, 0.1).tokens == int(0.1 * 2**30 // (24 * 2048))
    # A model with windows alone can run as many tokens as requests may have.
    mistral = room("mistralai/Mistral-7B-v0.1", NEEDED, 40)
    assert mistral.tokens == 64 * 32768 and mistral.reserved_bytes == 64 * 4096 * 131_072


def test_exact_keeps_a_state_for_each_running_request():
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    model = family(name)
    found = room(name, NEEDED, 20)
    assert found.reserved_bytes == 64 * model.state_bytes()
    assert found.tokens == int((20 * 2**30 - 64 * model.state_bytes()) // model.kv_bytes_per_token())
    assert room(name, ALL, 20) == found


def test_vllm_cuts_layers_in_groups_of_one_size_and_pays_for_those_that_are_not_full():
    # Gemma 3 27B: 10 layers see everything, 52 have a window of 1,024: groups of 10, so 60 are paid for.
    token = 16 * 2 * 128 * 2
    now, before = (room("google/gemma-3-27b-it", engine_rule(name), 60) for name in ("vllm", "vllm-0.14.0"))
    held = 64 * (1024 + 16) + 8192
    assert now.tokens == int((60 * 2**30 - 60 * token * held) // (10 * token)) and before == now
    # 12 and 13 layers: groups of 13, one of them not full. 10 and 14: by the version.
    for full, other, version, groups in (
        (13, 12, "vllm", (13, 13)),
        (10, 14, "vllm", (14, 14)),
        (10, 14, "vllm-0.14.0", (10, 20)),
    ):
        types = ["full_attention"] * full + ["sliding_attention"] * other
        fields = {"layer_types": types, "num_hidden_layers": len(types), "sliding_window": 128}
        found = room("openai/gpt-oss-20b", engine_rule(version), 10, **fields)
        windows = groups[1] * 2048 * (64 * (128 + 16) + 8192)
        assert found.tokens == int((10 * 2**30 - windows) // (groups[0] * 2048))


def test_vllm_keeps_layers_that_hold_the_same_tokens_in_one_group():
    for name in ("zai-org/GLM-5.2", "deepseek-ai/DeepSeek-V3.2", "meta-llama/Llama-3.1-8B"):
        assert room(name, engine_rule("vllm"), 10) == room(name, ALL, 10)


def test_vllm_makes_blocks_of_attention_as_large_as_a_state():
    # 36 linear and 12 full layers: groups of 12. A state of 2,146,304 bytes takes a block of 1,056 tokens of 2,048 bytes.
    found = room("Qwen/Qwen3-Next-80B-A3B-Instruct", engine_rule("vllm"), 20)
    assert found.reserved_bytes == 64 * 36 * 1056 * 2048
    assert found.tokens == int((20 * 2**30 - found.reserved_bytes) // (12 * 2048))


BLOCKS = {
    # What vLLM's own planning of the KV cache gives on the CPU, get_kv_cache_groups and get_kv_cache_config_from_groups of
    # 0.14.0 and 0.19.0 (v1/core/kv_cache_utils.py) and of 0.33.0 (v1/core/kv_cache_planning.py), alike: bytes of a block,
    # tokens in one of attention to all, and how many groups of other layers there are beside the one of those.
    "google/gemma-3-27b-it": (1_310_720, 16, 6),
    "openai/gpt-oss-20b": (393_216, 16, 1),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (786_432, 16, 3),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (25_952_256, 1056, 3),
    "nvidia/Nemotron-H-56B-Base-8K": (169_082_880, 4128, 6),
    "google/gemma-4-26B-A4B-it": (655_360, 32, 5),
    "stepfun-ai/Step-3.5-Flash": (786_432, 16, 3),
}


@pytest.mark.parametrize("version", ["vllm-0.14.0", "vllm-0.19.0", "vllm-0.33.0"])
@pytest.mark.parametrize("name", BLOCKS)
def test_vllm_has_as_many_blocks_as_its_own_planning_gives(name, version):
    block_bytes, block_tokens, others = BLOCKS[name]
    mixers = [layer.mixer for layer in family(name).stack]
    window = max(getattr(mixer, "window", None) or 0 for mixer in mixers)
    chunked = any(getattr(mixer, "chunked", False) for mixer in mixers)
    # Blocks of 16 tokens that a request holds of a window: one more than it fills, where it slides; of a state, one.
    held, step = 1, 0
    if window:
        held, step = window // 16 if chunked else -(-(window - 1) // 16) + 1, 8192 // 16
    free = int(120 * 2**30 // block_bytes) - others * (16 * held + step)
    found = room(name, engine_rule(version), 120, running=16)
    assert found.tokens == pytest.approx(free * block_tokens, rel=2e-3, abs=block_tokens)


def test_sglang_gives_windows_a_share_of_the_tokens_and_states_a_share_of_the_memory():
    rule = engine_rule("sglang")
    tokens = int(10 * 2**30 // (12 * 2048 + 0.8 * 12 * 2048))
    assert room("openai/gpt-oss-20b", rule, 10).tokens == tokens
    # A model that it has no such pool for, and a version that does not know one.
    assert room("google/gemma-3-27b-it", rule, 10) == room("google/gemma-3-27b-it", ALL, 10)
    gemma, older = (room("google/gemma-4-26B-A4B-it", engine_rule(name), 40) for name in ("sglang", "sglang-0.5.10"))
    assert older == room("google/gemma-4-26B-A4B-it", ALL, 40) and gemma.tokens > older.tokens
    # Where running requests could fill the pool of windows, requests no longer than one do.
    small = room("google/gemma-4-26B-A4B-it", rule, 10)
    assert small.tokens == int(0.8 * int(10 * 2**30 // (5 * 2 * 2048 + 0.8 * 25 * 8192)))
    # 0.9 for states to 1 for KV; three states a running request, and five where the cache has two buffers more.
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    found, before = room(name, rule, 19), room(name, engine_rule("sglang-0.5.10"), 19)
    assert found.tokens == before.tokens == int(10 * 2**30 // family(name).kv_bytes_per_token())
    states = int(9 * 2**30 // family(name).state_bytes())
    assert (states, found.running, before.running) == (125, (125 - 1) // 5, 125 // 3)


def test_windows_reserved_as_an_engine_does_are_in_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["openai/gpt-oss-20b"]))
    given = {"model": str(tmp_path), "gpu": "h100", "dtype": "bf16"}

    def tokens(**more: object) -> int:
        return resolve(settings_from(None, {**given, **more}), "overlap").scheduler.kv_tokens

    assert tokens() < tokens(engine="sglang", mem_fraction=0.9) < tokens(kv_windows="exact")


def test_sglang_keeps_the_states_of_running_requests_alone_without_a_prefix_cache(tmp_path):
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    given = {"model": str(tmp_path), "gpu": "h200", "dtype": "fp8", "engine": "sglang", "max_running": 48}
    cached, none = (
        resolve(settings_from(None, {**given, "cache": cache}), "overlap").kv_budget for cache in ("radix", "none")
    )
    assert none["reserved_bytes"] == 48 * family(name).state_bytes() < cached["reserved_bytes"]


def test_states_that_leave_no_room_say_how_many_requests_fit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["nvidia/Nemotron-H-56B-Base-8K"]))
    given = {"model": str(tmp_path), "gpu": "h200", "dtype": "fp8"}
    with pytest.raises(
        ModelDoesNotFit, match=r"a state of 870\.3 MiB a request .* not enough for max_running 256"
    ) as error:
        resolve(settings_from(None, given), "overlap")
    fits = int(str(error.value).split("--max-running ")[1].split()[0])
    assert resolve(settings_from(None, {**given, "max_running": fits}), "overlap").scheduler.kv_tokens > 10_000


def test_the_stage_with_the_least_room_for_states_says_how_many_requests_fit():
    # The last of three stages has room for the fewest tokens, the first for the fewest states: it has one more of them.
    def capacity(running: int) -> MemoryBudget:
        given = {"dtype": "fp8", "pp": 3, "mem_fraction": 0.88, "rule": engine_rule("sglang")}
        return kv_capacity(family("Qwen/Qwen3.5-27B"), load_gpu("h100"), max_running=running, **given)

    with pytest.raises(ModelDoesNotFit, match=r"a state of 52\.0 MiB a request .* max_running 120") as error:
        capacity(120)
    fits = int(str(error.value).split("--max-running ")[1].split()[0])
    assert fits < 120 < capacity(fits).running


def test_kv_is_held_as_the_checkpoint_says_if_the_user_asks_and_a_note_says_so_if_not(tmp_path):
    said = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    config = {**CONFIGS["meta-llama/Llama-3.1-8B"], "quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = resolve(settings_from(None, {"model": str(tmp_path)}), "overlap")
    auto = resolve(settings_from(None, {"model": str(tmp_path), "kv_dtype": "auto"}), "overlap")
    assert (plain.kv_dtype, auto.kv_dtype) == ("bf16", "fp8")
    assert plain.notes == ("KV is in bf16; the checkpoint has scales for fp8, which --kv-dtype auto takes",)
    assert auto.notes == () and auto.scheduler.kv_tokens == pytest.approx(2 * plain.scheduler.kv_tokens, rel=1e-4)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["meta-llama/Llama-3.1-8B"]))
    assert resolve(settings_from(None, {"model": str(tmp_path), "kv_dtype": "auto"}), "overlap").kv_dtype == "bf16"
