"""The reader of each family: from the fields of its config.json to its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from backends.checkpoint.config_fields import Fields
from backends.checkpoint.decoders import gemma4, latent, llama4, mimo_v2, nemotron_nas, plain, step3p5
from backends.checkpoint.families import DEFAULTS, SAME_AS
from backends.checkpoint.hybrids import nemotron_h, qwen3_next
from backends.checkpoint.language_model import by_our_names, sizes_within, text_values
from backends.checkpoint.layer_kinds import Stack


def _biased(fields: Fields, kind: str, **traits: Any) -> Stack:
    """A decoder whose attention has biases where ``attention_bias`` says so, and its MLPs where ``mlp_bias`` does."""
    bias = fields.flag("attention_bias")
    return plain(fields, kind, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"), **traits)


def _phi(fields: Fields, kind: str) -> Stack:
    # A norm of queries and keys is a LayerNorm of a head's width, which none of the published models has.
    fields.must_be("qk_layernorm", False)
    return plain(
        fields, kind, qkv_bias=True, o_bias=True, norms=1, norm_bias=True, gated=False, mlp_bias=True, head_bias=True
    )


def _phimoe(fields: Fields, kind: str) -> Stack:
    return _biased(fields, kind, norm_bias=True, head_bias=fields.flag("lm_head_bias"))


def _glm4_moe(fields: Fields, kind: str) -> Stack:
    bias = fields.flag("attention_bias")
    return plain(fields, kind, qkv_bias=bias, qk_norm="head" if fields.flag("use_qk_norm") else None)


def _qwen2_moe(fields: Fields, kind: str) -> Stack:
    return plain(fields, kind, qkv_bias=fields.flag("qkv_bias"), shared_gate=True)


READERS: dict[str, Callable[[Fields, str], Stack]] = {
    "llama": _biased,
    "mistral": plain,
    "ministral3": plain,
    "mixtral": plain,
    "qwen2": partial(plain, qkv_bias=True),
    "qwen2_vl_text": partial(plain, qkv_bias=True),
    "qwen2_moe": _qwen2_moe,
    "qwen3": partial(_biased, qk_norm="head"),
    "qwen3_moe": partial(_biased, qk_norm="head"),
    "qwen3_vl_text": partial(_biased, qk_norm="head"),
    "qwen3_vl_moe_text": partial(_biased, qk_norm="head"),
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "deepseek_v2": latent,
    "deepseek_v3": latent,
    "deepseek_v32": latent,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": latent,
    "glm_moe_dsa": latent,
    "minimax_m2": partial(plain, qk_norm="sums"),
    "nemotron_h": nemotron_h,
    "llama4_text": llama4,
    "gpt_oss": partial(_biased, sinks=True, expert_bias=True),
    "gemma": _biased,
    "gemma2": partial(_biased, norms=4),
    "gemma3_text": partial(_biased, norms=4, qk_norm="head"),
    "gemma4_text": gemma4,
    "phi": _phi,
    "phi3": plain,
    "phimoe": _phimoe,
    "olmo2": partial(_biased, qk_norm="gathered"),
    "smollm3": _biased,
    "granite": _biased,
    "mimo_v2_flash": mimo_v2,
    "nemotron-nas": nemotron_nas,
    "step3p5": step3p5,
}


def read_fields(values: Mapping[str, Any], source: str) -> tuple[Fields, str]:
    """Return the fields of a config.json's language model, with what absence means in its family, and the family's
    ``model_type``. Raises UnsupportedModel for one that no reader knows."""
    found, within = text_values(values, source)
    fields = Fields(found, source)
    said = fields.need("model_type", str)
    kind = SAME_AS.get(said, said)
    if kind not in READERS:
        raise fields.error("model_type", f"{said!r} is not supported; known: {', '.join([*READERS, *SAME_AS])}")
    assumed = sizes_within(said, kind) if within else {}
    return Fields(by_our_names(found, kind), source, {**assumed, **DEFAULTS[kind]}), kind


def read_stack(fields: Fields, kind: str) -> Stack:
    """Read the layers of a model of this ``model_type``. Raises UnsupportedModel, which names the field."""
    return READERS[kind](fields, kind)
