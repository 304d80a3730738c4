"""Layers of decoders that have attention and an MLP in each, out of the fields of a config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from backends.checkpoint import families
from backends.checkpoint.config_fields import Fields
from backends.checkpoint.layer_kinds import MLP, Attention, Dense, Experts, Indexer, Latent, Layer, Mixer, Stack

CHUNKED = "chunked_attention"


def plain(
    fields: Fields,
    kind: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: Literal["head", "sums", "gathered"] | None = None,
    sinks: bool = False,
    norms: int = 2,
    norm_bias: bool = False,
    gated: bool = True,
    mlp_bias: bool = False,
    expert_bias: bool = False,
    shared_gate: bool = False,
    head_bias: bool = False,
) -> Stack:
    """Read a decoder whose layers are alike but for windows and experts.

    ``qk_norm``: queries and keys have a norm of a head's width, or one over all heads, for which GPUs that share them
    exchange sums, or gather the heads. ``norms``: how many a layer has; ``norm_bias``: they are LayerNorms.
    ``expert_bias``: the router and each expert's matrices have biases. ``shared_gate``: beside the experts is a shared
    one of a width of its own, behind a gate of one number (Qwen2).
    """
    hidden = fields.size("hidden_size")
    each = attention(fields, qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm, sinks=sinks)
    norm = hidden * (2 if norm_bias else 1)
    mixed = families.mixtures(fields, families.experts(fields))
    layers = []
    for window, sparse in zip(families.windows(fields, kind), mixed, strict=True):
        if sparse:
            mlp: MLP = gated_experts(fields) if shared_gate else experts(fields, bias=expert_bias)
        else:
            mlp = dense(fields, gated=gated, bias=mlp_bias)
        layers.append(Layer(replace(each, window=window), mlp, norms * norm))
    head = fields.size("vocab_size") if head_bias else 0
    return Stack(tuple(layers), norm + head)


def attention(
    fields: Fields,
    *,
    window: int | None = None,
    chunked: bool = False,
    gated: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: Literal["head", "sums", "gathered"] | None = None,
    sinks: bool = False,
) -> Attention:
    """Read softmax attention of the usual fields."""
    heads, kv_heads, width = fields.size("num_attention_heads"), families.kv_heads(fields), families.head_dim(fields)
    vectors = heads if sinks else 0
    if qkv_bias:
        vectors += (heads * (2 if gated else 1) + 2 * kv_heads) * width
    if o_bias:
        vectors += fields.size("hidden_size")
    if qk_norm is not None:
        vectors += 2 * width if qk_norm == "head" else (heads + kv_heads) * width
    over_all = None if qk_norm == "head" else qk_norm
    return Attention(heads, kv_heads, width, width, window, chunked, gated, normed_over_all=over_all, vectors=vectors)


def dense(fields: Fields, name: str = "intermediate_size", *, gated: bool = True, bias: bool = False) -> Dense:
    """Read an MLP."""
    width = fields.size(name)
    inner = (2 if gated else 1) * width
    return Dense(width, gated, inner + fields.size("hidden_size") if bias else 0)


def experts(
    fields: Fields,
    *,
    shared_width: int | None = None,
    gated: bool = True,
    bias: bool = False,
    vectors: int = 0,
    **more: Any,
) -> Experts:
    """Read a mixture of experts of the usual fields; ``shared_width`` where its shared experts are said otherwise than by
    their number."""
    count, per_token = families.experts(fields), fields.size("num_experts_per_tok")
    if per_token > count:
        raise fields.error("num_experts_per_tok", f"{per_token}, with {count} experts")
    width = fields.size("moe_intermediate_size" if fields.raw("moe_intermediate_size") else "intermediate_size")
    if bias:
        vectors += count * ((2 if gated else 1) * width + fields.size("hidden_size") + 1)
    if shared_width is None:
        shared_width = fields.count("n_shared_experts") * width
    return Experts(count, per_token, width, shared_width, gated, vectors=vectors, **more)


def gated_experts(fields: Fields) -> Experts:
    """Read experts with a shared one behind a gate of one number."""
    width = fields.count("shared_expert_intermediate_size")
    return experts(fields, shared_width=width, vectors=fields.size("hidden_size") if width else 0)


def latent(fields: Fields, kind: str) -> Stack:
    """Read DeepSeek's decoders and those like them: latent attention, with an indexer from V3.2 on, and experts after the
    first layers."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.raw("kv_lora_rank") is None:
        raise fields.error("kv_lora_rank", "missing")
    q_rank = fields.size("q_lora_rank") if fields.raw("q_lora_rank") is not None else None
    rank, rope = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
    bias = (q_rank or 0) + rank + rope + hidden if fields.flag("attention_bias") else 0
    topk = fields.size("index_topk") if fields.raw("index_topk") is not None else None
    indexer = Indexer(fields.size("index_n_heads"), fields.size("index_head_dim")) if topk is not None else None
    layers = []
    for sparse, own in zip(families.mixtures(fields, families.experts(fields)), _indexed(fields), strict=True):
        chooses = indexer if own else None
        mixer = Latent(
            heads,
            q_rank,
            rank,
            fields.size("qk_nope_head_dim"),
            rope,
            fields.size("v_head_dim"),
            topk,
            chooses,
            # Norms of both latents, and the LayerNorm of an indexer's keys.
            (q_rank or 0) + rank + bias + (2 * chooses.head_dim if chooses is not None else 0),
        )
        layers.append(Layer(mixer, experts(fields) if sparse else dense(fields), 2 * hidden))
    return Stack(tuple(layers), hidden)


def _indexed(fields: Fields) -> Sequence[bool]:
    """Tell of each layer whether it has an indexer of its own, or takes what the one before it chose (GLM-5.2)."""
    layers = fields.size("num_hidden_layers")
    types = fields.texts("indexer_types")
    if not types:
        return (True,) * layers
    if len(types) != layers or set(types) - {"full", "shared"} or types[0] != "full":
        raise fields.error("indexer_types", f"not 'full' or 'shared' for each of {layers} layers, the first full")
    return tuple(each == "full" for each in types)


def llama4(fields: Fields, kind: str) -> Stack:
    """Read Llama 4: attention in chunks but in every fourth layer, one shared expert of a routed one's size."""
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    types = families.layer_types(fields, layers, (families.FULL, CHUNKED))
    if types is None:
        rotary = fields.raw("no_rope_layers")  # 1 where there are rotary embeddings
        if not rotary:
            every = fields.size("no_rope_layer_interval")
            rotary = [(layer + 1) % every != 0 for layer in range(layers)]
        if not isinstance(rotary, list) or len(rotary) != layers:
            raise fields.error("no_rope_layers", f"not an entry for each of {layers} layers")
        types = tuple(CHUNKED if each else families.FULL for each in rotary)
    bias = fields.flag("attention_bias")
    chunk = fields.size("attention_chunk_size") if fields.raw("attention_chunk_size") is not None else None
    full = attention(fields, qkv_bias=bias, o_bias=bias)
    chunked = attention(fields, window=chunk, chunked=chunk is not None, qkv_bias=bias, o_bias=bias)
    sparse = _moe_layers(fields, layers)
    routed = experts(fields, shared_width=fields.size("intermediate_size")) if any(sparse) else None
    return Stack(
        tuple(
            Layer(
                chunked if each == CHUNKED else full,
                routed if mixture else dense(fields, "intermediate_size_mlp"),
                2 * hidden,
            )
            for each, mixture in zip(types, sparse, strict=True)
        ),
        hidden,
    )


def _moe_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    named = fields.raw("moe_layers")
    if named is None:
        step = fields.size("interleave_moe_layer_step")
        return tuple((layer + 1) % step == 0 for layer in range(layers))
    if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
        raise fields.error("moe_layers", f"{named!r} is not a list of layers")
    return tuple(layer in named for layer in range(layers))


def gemma4(fields: Fields, kind: str) -> Stack:
    """Read Gemma 4: wider heads in layers that see everything, values that are keys there, a dense MLP beside experts."""
    for field in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if fields.count(field):
            raise fields.error(field, f"{fields.count(field)} is not modelled; only 0 is")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    same = fields.flag("attention_k_eq_v")
    sparse = fields.flag("enable_moe_block")
    if sparse:
        routed = fields.over({"num_experts_per_tok": fields.size("top_k_experts")})
        # A scale for the router's input and one an expert; three norms more, which stand with the layer's.
        count = families.experts(fields)
        mlp: MLP = experts(
            routed, shared_width=0, dense_width=fields.size("intermediate_size"), vectors=hidden + count, name="experts"
        )
    else:
        mlp = dense(fields)
    layers = []
    for window in families.windows(fields, kind):
        if window is None:
            width = fields.size("global_head_dim", 512)
            kv_heads = families.kv_heads(fields)
            if same:
                kv_heads = fields.size("num_global_key_value_heads", kv_heads)
        else:
            width, kv_heads = fields.size("head_dim"), families.kv_heads(fields)
        bias = (heads + (1 if same and window is None else 2) * kv_heads) * width + hidden
        mixer = Attention(
            heads,
            kv_heads,
            width,
            width,
            window,
            keys_are_values=same and window is None,
            vectors=2 * width + (bias if fields.flag("attention_bias") else 0),
        )
        layers.append(Layer(mixer, mlp, (7 if sparse else 4) * hidden))
    return Stack(tuple(layers), hidden)


def mimo_v2(fields: Fields, kind: str) -> Stack:
    """Read MiMo-V2: windows in most layers, which have sinks and KV heads of their own; values narrower than keys."""
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    windowed = _marks(fields, "hybrid_layer_pattern", layers)
    mixed = _marks(fields, "moe_layer_freq", layers)
    routed = experts(fields)
    bias = fields.flag("attention_bias")

    def mixer(prefix: str, window: int | None, sinks: bool) -> Mixer:
        heads, kv_heads = fields.size(f"{prefix}num_attention_heads"), fields.size(f"{prefix}num_key_value_heads")
        keys, values = fields.size(f"{prefix}head_dim"), fields.size(f"{prefix}v_head_dim")
        vectors = (heads if sinks else 0) + (heads * keys + kv_heads * (keys + values) if bias else 0)
        return Attention(heads, kv_heads, keys, values, window, vectors=vectors)

    full = mixer("", None, fields.flag("add_full_attention_sink_bias"))
    local = mixer("swa_", fields.size("sliding_window"), fields.flag("add_swa_attention_sink_bias"))
    return Stack(
        tuple(
            Layer(local if window else full, routed if mixture else dense(fields), 2 * hidden)
            for window, mixture in zip(windowed, mixed, strict=True)
        ),
        hidden,
    )


def step3p5(fields: Fields, kind: str) -> Stack:
    """Read Step 3.5 and 3.7: windows in most layers, which may have more heads, a gate for each head, and experts beside a
    shared one."""
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    # The last entries of the lists are of layers that draft.
    types = _first(fields, "layer_types", layers) or [families.FULL] * layers
    for each in types:
        if each not in (families.FULL, families.SLIDING):
            raise fields.error(
                "layer_types", f"{each!r} is not supported; supported: {families.FULL}, {families.SLIDING}"
            )
    local = families.SLIDING in types
    window = fields.size("sliding_window") if local else None
    other = fields.inner("attention_other_setting")
    named = {
        "num_attention_heads": fields.raw("num_sliding_attention_heads") or other.raw("num_attention_heads"),
        "num_key_value_heads": other.raw("num_attention_groups"),
        "head_dim": other.raw("head_dim"),
    }
    sliding = fields.over({field: value for field, value in named.items() if value is not None})
    fields.must_be("mlp_bias", False)
    bias = fields.flag("attention_bias")
    gates = fields.get("use_head_wise_attn_gate", bool, True) is True
    mixers = {
        each: attention(
            of, window=window if each == families.SLIDING else None, qkv_bias=bias, o_bias=bias, qk_norm="head"
        )
        for each, of in ((families.FULL, fields), (families.SLIDING, sliding))
        if each in types
    }
    routed = experts(fields, shared_width=fields.count("share_expert_dim"))
    return Stack(
        tuple(
            Layer(
                replace(mixers[each], head_gates=gates),
                routed if mixture else dense(fields),
                2 * hidden,
            )
            for each, mixture in zip(types, _step_mixtures(fields, layers), strict=True)
        ),
        hidden,
    )


def _step_mixtures(fields: Fields, layers: int) -> list[bool]:
    types = _first(fields, "mlp_layer_types", layers)
    if types:
        if set(types) - {"dense", "sparse"}:
            raise fields.error("mlp_layer_types", f"not 'dense' or 'sparse' for each of {layers} layers")
        return [each == "sparse" for each in types]
    named = fields.raw("moe_layers_enum")
    if named is None:
        dense = 3 if fields.raw("first_k_dense_replace") is None else fields.count("first_k_dense_replace")
        return [layer >= dense for layer in range(layers)]
    listed = named.split(",") if isinstance(named, str) else named
    try:
        sparse = {int(each) for each in listed}
    except (TypeError, ValueError):
        raise fields.error("moe_layers_enum", f"{named!r} is not a list of layers") from None
    return [layer in sparse for layer in range(layers)]


def _first(fields: Fields, field: str, layers: int) -> list[str]:
    """The entries of a list that are of the model's own layers; empty where there is no list."""
    listed = fields.texts(field)
    if listed and len(listed) not in (layers, layers + families.drafting_layers(fields)):
        raise fields.error(field, f"{len(listed)} entries for {layers} layers")
    return listed[:layers]


def nemotron_nas(fields: Fields, kind: str) -> Stack:
    """Read Llama-Nemotron Super and Ultra, whose layers a search has made unlike: each has KV heads and an MLP's width of
    its own, or lacks attention or MLP, and the norm before it."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    layers = fields.size("num_hidden_layers")
    blocks = fields.objects("block_configs")
    if len(blocks) != layers:
        raise fields.error("block_configs", f"{len(blocks)} entries for {layers} layers")
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    stack = []
    for block in blocks:
        said, ffn = block.inner("attention"), block.inner("ffn")
        for part, nothing in ((said, ("sparsify", "window_length", "num_sink_tokens")), (ffn, ("sparsify",))):
            for field in (*nothing, "replace_with_linear"):
                if part.raw(field):
                    raise part.error(field, f"{part.raw(field)!r} is not modelled")
        mixer = None
        if not said.flag("no_op"):
            group = said.size("n_heads_in_group")
            if heads % group:
                raise said.error("n_heads_in_group", f"{group} does not divide {heads} attention heads")
            mixer = attention(fields.over({"num_key_value_heads": heads // group}), qkv_bias=bias, o_bias=bias)
        mlp = None
        if not ffn.flag("no_op"):
            width = ffn.size("intermediate_size") if ffn.raw("ffn_mult") is None else _multiplied(ffn, hidden)
            mlp = dense(fields.over({"intermediate_size": width}), bias=mlp_bias)
        stack.append(Layer(mixer, mlp, hidden * ((mixer is not None) + (mlp is not None))))
    return Stack(tuple(stack), hidden)


def _multiplied(ffn: Fields, hidden: int) -> int:
    """Inner width of an MLP by its multiplier, two thirds of which count as it is gated, up to the next 256."""
    width = int(2 * ffn.need("ffn_mult", float) * hidden / 3)
    if width < 1:
        raise ffn.error("ffn_mult", f"{ffn.raw('ffn_mult')!r} leaves no width")
    return -(-width // 256) * 256


def _marks(fields: Fields, field: str, layers: int) -> list[int]:
    """A 0 or a 1 for each layer."""
    marks = fields.raw(field)
    if not isinstance(marks, list) or len(marks) != layers or set(marks) - {0, 1}:
        raise fields.error(field, f"not a 0 or a 1 for each of {layers} layers")
    return marks
