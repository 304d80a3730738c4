"""Families of models, and where they differ, by the ``model_type`` of a config.json.

Both worlds ask here: which layers have a window, which are mixtures of experts, how long a sequence may be, and what a field
means that the file leaves out.
"""

from __future__ import annotations

from typing import Any

from backends.checkpoint.config_fields import Fields

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

_GATED_DELTA = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_INDEXED = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "index_topk": 2048,
    "index_head_dim": 128,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen2_vl_text": {"num_key_value_heads": 8, "sliding_window": 4096, "max_window_layers": 80},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "qwen2_moe": {
        "num_key_value_heads": 16,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "qwen3_vl_text": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_vl_moe_text": {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {
        **_GATED_DELTA,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_text": {**_GATED_DELTA, "num_key_value_heads": 4},
    "qwen3_5_moe_text": {
        **_GATED_DELTA,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "deepseek_v2": {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
    },
    "deepseek_v3": {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
    },
    "deepseek_v32": {
        **_INDEXED,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "index_n_heads": 64,
    },
    "glm_moe_dsa": {
        **_INDEXED,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "index_n_heads": 32,
    },
    "glm4_moe": {
        "num_key_value_heads": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
    },
    "minimax_m2": {"num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8},
    "nemotron_h": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "chunk_size": 128,
        "use_conv_bias": True,
    },
    "llama4_text": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
    },
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_144,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "tie_word_embeddings": True,
    },
    "phi": {},
    "phi3": {},
    "phimoe": {"num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128},
    "mimo_v2_flash": {},
    "nemotron-nas": {},
    "step3p5": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 128_000,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
    },
    "olmo2": {},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "granite": {},
}
"""Values that transformers' classes assume for fields that a file leaves out, where that is not null, false or none."""

SAME_AS = {
    "kimi_k2": "deepseek_v3",
    "mimo": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_vl_text",
    "qwen2_5_vl_text": "qwen2_vl_text",
    "step3p7": "step3p5",
}
"""Types whose language model is another's."""

EVERY_LAYER = frozenset({"mistral", "ministral3", "mixtral", "phi3", "phimoe"})
SWITCHED = frozenset({"qwen2", "qwen2_vl_text", "qwen2_moe", "qwen3", "smollm3"})
"""A window only with ``use_sliding_window``, and from layer ``max_window_layers`` on."""
SWITCHED_EVERYWHERE = frozenset({"qwen3_moe"})
FULL_EVERY = {"gpt_oss": 2, "gemma2": 2, "gemma3_text": 6, "gemma4_text": 6}
"""Every so many layers one sees everything, the others have the window."""
DRAFTING = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Names under which families say how many layers draft further tokens."""


def windows(fields: Fields, kind: str) -> tuple[int | None, ...]:
    """Read how many of the last tokens a token sees in each layer of a model of this ``model_type``; None for all.

    ``layer_types`` wins where the file has it. Raises UnsupportedModel.
    """
    layers = fields.size("num_hidden_layers")
    window = _window(fields, kind)
    types = layer_types(fields, layers)
    if types is not None:
        if SLIDING in types and window is None:
            raise fields.error("layer_types", f"has {SLIDING!r}, but there is no sliding window")
        return tuple(window if each == SLIDING else None for each in types)
    if window is None:
        return (None,) * layers
    if kind in SWITCHED:
        first = fields.count("max_window_layers")
        return tuple(window if layer >= first else None for layer in range(layers))
    every = FULL_EVERY.get(kind)
    if every is None:
        return (window,) * layers
    every = fields.size("sliding_window_pattern", every)
    return tuple(None if (layer + 1) % every == 0 else window for layer in range(layers))


def _window(fields: Fields, kind: str) -> int | None:
    """The window of those layers that have one."""
    switched = kind in SWITCHED | SWITCHED_EVERYWHERE
    if kind not in EVERY_LAYER | FULL_EVERY.keys() and not switched:
        return None
    if switched and not fields.flag("use_sliding_window"):
        return None
    return fields.size("sliding_window") if fields.raw("sliding_window") is not None else None


def layer_types(fields: Fields, layers: int, known: tuple[str, ...] = (FULL, SLIDING)) -> tuple[str, ...] | None:
    """The kind of each layer, None where the file does not say. Raises UnsupportedModel for kinds that are not ``known``."""
    kinds = fields.raw("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(isinstance(each, str) for each in kinds):
        raise fields.error("layer_types", f"{kinds!r} is not a list of texts")
    if len(kinds) != layers:
        raise fields.error("layer_types", f"{len(kinds)} entries for {layers} layers")
    for each in kinds:
        if each not in known:
            raise fields.error("layer_types", f"{each!r} is not supported; supported: {', '.join(known)}")
    return tuple(kinds)


def mixtures(fields: Fields, experts: int) -> tuple[bool, ...]:
    """Tell of each layer whether its MLP is a mixture of experts. Raises UnsupportedModel."""
    layers = range(fields.size("num_hidden_layers"))
    if not experts:
        return (False,) * len(layers)
    types = fields.texts("mlp_layer_types")
    if types:
        if len(types) != len(layers) or set(types) - {"dense", "sparse"}:
            raise fields.error("mlp_layer_types", f"not 'dense' or 'sparse' for each of {len(layers)} layers")
        return tuple(each == "sparse" for each in types)
    dense = fields.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise fields.error("mlp_only_layers", f"{dense!r} is not a list of layers")
    step, every = fields.size("decoder_sparse_step", 1), fields.size("moe_layer_freq", 1)
    first = fields.count("first_k_dense_replace")
    return tuple(
        layer >= first and layer % every == 0 and (layer + 1) % step == 0 and layer not in dense for layer in layers
    )


def experts(fields: Fields) -> int:
    """Routed experts of a mixture layer, 0 for a dense model. Raises UnsupportedModel."""
    # transformers 5 writes num_local_experts; published checkpoints of Qwen have num_experts, DeepSeek's n_routed_experts.
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    written = [name for name in names if fields.values.get(name) is not None]
    assumed = [name for name in names if fields.raw(name) is not None]
    found = written or assumed
    return fields.count(found[0]) if found else 0


def drafting_layers(fields: Fields) -> int:
    """Read how many layers draft further tokens (multi-token prediction), beside those of the model."""
    return max(fields.count(name) for name in DRAFTING)


def kv_heads(fields: Fields) -> int:
    """Read the number of KV heads: as many as of queries where the file says null. Raises UnsupportedModel where they do not
    serve equally many heads of queries."""
    heads = fields.size("num_attention_heads")
    found = fields.size("num_key_value_heads", heads)
    if heads % found:
        raise fields.error("num_key_value_heads", f"{found} does not divide {heads} attention heads")
    return found


def head_dim(fields: Fields) -> int:
    """Read the width of a head, the model's divided by the heads where the file does not say. Raises UnsupportedModel.

    Heads of latent attention have widths of their own.
    """
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    if fields.get("head_dim", int) is None and fields.raw("kv_lora_rank") is None and hidden % heads:
        raise fields.error("head_dim", f"missing, and hidden_size {hidden} is not a multiple of {heads} heads")
    return fields.size("head_dim", max(hidden // heads, 1))


def context_tokens(fields: Fields) -> int:
    """Read how many tokens a sequence may have, prompt and output together. Raises UnsupportedModel.

    Qwen's instructions add yarn to a file whose ``max_position_embeddings`` still is the original context.
    """
    longest = fields.size("max_position_embeddings")
    scaling = fields.object(rope_field(fields))
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return longest
    inner = Fields({key: value for key, value in scaling.items() if value is not None}, fields.source)
    field = "original_max_position_embeddings"
    # transformers lets the field outside win over the one inside.
    original = fields.get(field, int) or inner.get(field, int, longest)
    factor = inner.get("factor", float, 1.0)
    assert original is not None and factor is not None
    return max(longest, int(original * factor))


def rope_field(fields: Fields) -> str:
    """Name the field of the scaling of rotary embeddings: transformers 5 calls it otherwise."""
    return "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
