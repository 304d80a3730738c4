"""Layers of decoders that mix attention with recurrences, out of the fields of a config.json."""

from __future__ import annotations

from dataclasses import replace

from backends.checkpoint import families
from backends.checkpoint.config_fields import Fields
from backends.checkpoint.decoders import attention, dense, experts, gated_experts
from backends.checkpoint.layer_kinds import GatedDelta, Layer, Mamba2, Stack

STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCKS = {
    "M": "mamba",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
    "linear_attention": "mamba",
    "full_attention": "attention",
}
"""Letters of a pattern, and transformers' words, for what a layer of Nemotron-H is."""


def qwen3_next(fields: Fields, kind: str) -> Stack:
    """Read Qwen3-Next and Qwen3.5: linear attention, and gated attention in every fourth layer."""
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    types = families.layer_types(fields, layers, (families.FULL, families.LINEAR))
    if types is None:
        every = fields.size("full_attention_interval", 4)
        types = tuple(families.LINEAR if (layer + 1) % every else families.FULL for layer in range(layers))
    gated = bool(fields.get("attn_output_gate", bool, True))
    bias = fields.flag("attention_bias")
    full = attention(fields, gated=gated, qkv_bias=bias, o_bias=bias, qk_norm="head")
    linear = GatedDelta(
        fields.size("linear_num_key_heads"),
        fields.size("linear_num_value_heads"),
        fields.size("linear_key_head_dim"),
        fields.size("linear_value_head_dim"),
        fields.size("linear_conv_kernel_dim"),
        _state_bytes(fields, "mamba_ssm_dtype"),
    )
    if linear.value_heads % linear.key_heads:
        raise fields.error(
            "linear_num_key_heads", f"{linear.key_heads} does not divide {linear.value_heads} value heads"
        )
    routed = families.experts(fields)
    mixed = families.mixtures(fields, routed)
    sparse = gated_experts(fields) if routed else None
    return Stack(
        tuple(
            Layer(full if each == families.FULL else linear, sparse if mixture else dense(fields), 2 * hidden)
            for each, mixture in zip(types, mixed, strict=True)
        ),
        hidden,
    )


def nemotron_h(fields: Fields, kind: str) -> Stack:
    """Read Nemotron-H and Nemotron 3: each layer is a state space, attention, an MLP or experts, with one norm."""
    hidden = fields.size("hidden_size")
    blocks = nemotron_blocks(fields)
    bias, conv_bias = fields.flag("use_bias"), fields.get("use_conv_bias", bool, True)
    shape = Mamba2(
        fields.size("mamba_num_heads"),
        fields.size("mamba_head_dim"),
        fields.size("n_groups"),
        fields.size("ssm_state_size"),
        fields.size("conv_kernel"),
        fields.size("chunk_size"),
        state_bytes=_state_bytes(fields, "mamba_ssm_cache_dtype"),
    )
    biases = (shape.conv_channels if conv_bias else 0) + (
        shape.inner + shape.conv_channels + shape.heads + hidden if bias else 0
    )
    mamba = Layer(replace(shape, biases=biases), None, hidden)
    named = fields.with_defaults(head_dim=fields.raw("attention_head_dim") or fields.raw("head_dim"))
    mlp_bias = fields.flag("mlp_bias")
    made = {"mamba": mamba, "attention": Layer(attention(named), None, hidden)}
    if "mlp" in blocks:
        made["mlp"] = Layer(None, dense(fields, gated=False, bias=mlp_bias), hidden)
    if "moe" in blocks:
        latent = fields.size("moe_latent_size") if fields.raw("moe_latent_size") is not None else None
        width = fields.size("moe_shared_expert_intermediate_size")
        vectors = 0
        if mlp_bias:
            vectors = width + hidden + (latent + hidden if latent is not None else 0)
        made["moe"] = Layer(
            None, experts(fields, shared_width=width, gated=False, latent=latent, vectors=vectors), hidden
        )
    return Stack(tuple(made[block] for block in blocks), hidden)


def nemotron_blocks(fields: Fields) -> list[str]:
    """Read what each layer is. Raises UnsupportedModel."""
    for field in ("layers_block_type", "layer_types", "hybrid_override_pattern"):
        said = fields.raw(field)
        if said is None:
            continue
        if not isinstance(said, str if field == "hybrid_override_pattern" else list):
            raise fields.error(field, f"{said!r} is not what each layer is")
        blocks = [_BLOCKS.get(each, each) if isinstance(each, str) else each for each in said]
        for each in blocks:
            if each not in _BLOCKS.values():
                raise fields.error(field, f"{each!r} is not supported; supported: {', '.join(_BLOCKS)}")
        layers = fields.get("num_hidden_layers", int)
        if not blocks or (layers is not None and layers != len(blocks)):
            raise fields.error(field, f"{len(blocks)} entries for {layers} layers")
        return blocks
    raise fields.error("hybrid_override_pattern", "missing")


def _state_bytes(fields: Fields, field: str) -> int:
    """Bytes of an element of a recurrent state, 4 where the file does not say."""
    name = fields.get(field, str, "float32")
    if name not in STATE_BYTES:
        raise fields.error(field, f"{name!r} is not supported; supported: {', '.join(STATE_BYTES)}")
    return STATE_BYTES[name]
