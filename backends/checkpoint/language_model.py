"""The fields of a config.json's language model: of the one inside a multimodal model, under the names that ours have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.checkpoint.config_fields import Fields

WITHIN = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal models keep the fields of their language model."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
SIZES_OF = {
    "llama": (4096, 32, 32, 11_008, 32_000, 2048),
    "mistral": (4096, 32, 32, 14_336, 32_000, 131_072),
    "ministral3": (4096, 34, 32, 14_336, 131_072, 262_144),
    "mixtral": (4096, 32, 32, 14_336, 32_000, 131_072),
    "qwen2": (4096, 32, 32, 22_016, 151_936, 32_768),
    "qwen2_moe": (2048, 24, 16, 5632, 151_936, 32_768),
    "qwen2_vl_text": (8192, 80, 64, 29_568, 152_064, 32_768),
    "qwen3": (4096, 32, 32, 22_016, 151_936, 32_768),
    "qwen3_moe": (2048, 24, 32, 6144, 151_936, 32_768),
    "qwen3_vl_text": (4096, 32, 32, 22_016, 151_936, 128_000),
    "qwen3_vl_moe_text": (2048, 24, 16, 5632, 151_936, 128_000),
    "qwen3_next": (2048, 48, 16, 5632, 151_936, 32_768),
    "qwen3_5_text": (4096, 32, 16, 12_288, 248_320, 32_768),
    "qwen3_5_moe_text": (2048, 40, 16, None, 248_320, 32_768),
    "deepseek_v2": (4096, 32, 32, 11_008, 102_400, 2048),
    "deepseek_v3": (7168, 61, 128, 18_432, 129_280, 4096),
    "deepseek_v32": (7168, 61, 128, 18_432, 129_280, 163_840),
    "glm4_moe": (4096, 46, 96, 10_944, 151_552, 131_072),
    "glm4_moe_lite": (2048, 47, 20, 10_240, 154_880, 202_752),
    "glm_moe_dsa": (6144, 78, 64, 12_288, 154_880, 202_752),
    "minimax_m2": (3072, 62, 48, 1536, 200_064, 196_608),
    "nemotron_h": (4096, None, 32, 21_504, 131_072, 4096),
    "llama4_text": (5120, 48, 40, 8192, 202_048, 131_072),
    "gpt_oss": (2880, 36, 64, 2880, 201_088, 131_072),
    "gemma": (3072, 28, 16, 24_576, 256_000, 8192),
    "gemma2": (2304, 26, 8, 9216, 256_000, 8192),
    "gemma3_text": (2304, 26, 8, 9216, 262_208, 131_072),
    "gemma4_text": (2304, 30, 8, 9216, 262_144, 131_072),
    "phi": (2048, 24, 32, 8192, 51_200, 2048),
    "phi3": (3072, 32, 32, 8192, 32_064, 4096),
    "phimoe": (4096, 32, 32, 6400, 32_064, 131_072),
    "olmo2": (4096, 32, 32, 11_008, 50_304, 2048),
    "smollm3": (2048, 36, 16, 11_008, 128_256, 32_768),
    "granite": (4096, 32, 32, 11_008, 32_000, 2048),
    "mimo_v2_flash": (4096, 48, 64, 16_384, 152_576, 131_072),
    "step3p5": (4096, 45, 64, 11_264, 128_815, 128_000),
}
"""Sizes that transformers' classes assume. A config.json inside another leaves out what is equal to them; one that stands
alone has them all."""

ALIASES = {
    "step3p5": {
        "num_attention_groups": "num_key_value_heads",
        "moe_num_experts": "n_routed_experts",
        "moe_top_k": "num_experts_per_tok",
        "share_expert_dims": "share_expert_dim",
        "num_mtp_layers": "num_nextn_predict_layers",
        "max_seq_len": "max_position_embeddings",
    },
}
"""Other names of fields, by the family that writes them."""


def text_values(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], bool]:
    """Return the fields of the language model, and whether they stand in a field of a multimodal model: those inside over
    those outside, but that nothing inside is said over something outside. Raises UnsupportedModel."""
    for field in WITHIN:
        inner = Fields(values, source).object(field)
        if inner:
            said = {name: value for name, value in inner.items() if value is not None or values.get(name) is None}
            found, _ = text_values({**{k: v for k, v in values.items() if k != field}, **said}, source)
            return found, True
    return dict(values), False


def sizes_within(model_type: str, same_as: str) -> dict[str, Any]:
    """What a size means that a language model within another leaves out; nothing is known of some families."""
    sizes = SIZES_OF.get(model_type) or SIZES_OF.get(same_as) or ()
    return {name: size for name, size in zip(SIZES, sizes, strict=False) if size is not None}


def by_our_names(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The same fields, with the names of ours for those that a family calls otherwise."""
    names = ALIASES.get(kind, {})
    renamed = {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs) is not None}
    return {**renamed, **{name: value for name, value in values.items() if name not in names}}
