"""Shapes of the matrix products of a layer as engines run them, fused and divided over GPUs."""

from __future__ import annotations

from backends.checkpoint.layer_kinds import Attention, GatedDelta, Latent, Mixer

Shapes = dict[str, tuple[int, int]]
"""Columns and rows of the weights of matrix products by name."""


def around_mixer(mixer: Mixer, hidden: int, tp: int) -> Shapes:
    """The products before and after attention or a recurrence, on one of ``tp`` GPUs; not that of :func:`expand_latents`."""
    if isinstance(mixer, Attention):
        heads, kv_heads = mixer.heads // tp, max(mixer.kv_heads // tp, 1)
        queries = heads * mixer.head_dim * (2 if mixer.gated else 1)
        values = 0 if mixer.keys_are_values else mixer.value_dim
        return {
            "qkv_proj": (queries + kv_heads * (mixer.head_dim + values), hidden),
            "o_proj": (hidden, heads * mixer.value_dim),
        }
    if isinstance(mixer, Latent):
        return _around_latents(mixer, hidden, tp)
    inner = mixer.inner // tp
    if isinstance(mixer, GatedDelta):
        return {
            "in_proj_qkvz": (mixer.conv_channels // tp + inner, hidden),
            "in_proj_ba": (2 * mixer.value_heads // tp, hidden),
            "out_proj": (hidden, inner),
        }
    states = 2 * max(mixer.groups // tp, 1) * mixer.state_size
    return {"in_proj": (2 * inner + states + mixer.heads // tp, hidden), "out_proj": (hidden, inner)}


def _around_latents(mixer: Latent, hidden: int, tp: int) -> Shapes:
    heads, rank = mixer.heads // tp, mixer.q_lora_rank
    query = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    if rank is None:
        found = {"q_proj": (query, hidden), "kv_a_proj": (mixer.latent, hidden)}
    else:
        found = {"qkv_a_proj": (rank + mixer.latent, hidden), "q_b_proj": (query, rank)}
    found["o_proj"] = (hidden, heads * mixer.v_head_dim)
    if mixer.indexer is not None:
        # Every GPU has the whole indexer.
        index = mixer.indexer
        found["indexer_q_proj"] = (index.heads * index.head_dim, rank or hidden)
        found["indexer_k_proj"] = (index.head_dim + index.heads, hidden)
    return found


def expand_latents(mixer: Latent, tp: int) -> Shapes:
    """The product that makes keys and values out of latents, which decodes absorb."""
    width = mixer.heads // tp * (mixer.qk_nope_head_dim + mixer.v_head_dim)
    return {"kv_b_proj": (width, mixer.kv_lora_rank)}


def of_mlp(prefix: str, hidden: int, width: int, gated: bool) -> Shapes:
    """The products of an MLP of an inner ``width`` on a GPU."""
    return {
        f"{prefix}gate_up_proj": ((2 if gated else 1) * width, hidden),
        f"{prefix}down_proj": (hidden, width),
    }
