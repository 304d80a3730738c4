"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from backends.torch.config import Fields, ModelConfig
from backends.torch.models.decoder import Model


def windows(fields: Fields) -> tuple[int | None, ...]:
    """Each layer's window as Qwen's dense models state it. Raises UnsupportedModel.

    Without ``use_sliding_window`` there is none; with it, ``layer_types`` says which layers have it, or else those from
    ``max_window_layers`` on do.
    """
    layers = fields.size("num_hidden_layers")
    window = fields.get("sliding_window", int) if fields.get("use_sliding_window", bool) else None
    if window is None:
        return fields.no_windows()
    if fields.values.get("layer_types") is not None:
        kinds = fields.layer_types({"full_attention", "sliding_attention"})
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.get("max_window_layers", int, 0) or 0
    return tuple(window if layer >= first else None for layer in range(layers))


class Qwen2ForCausalLM(Model):
    """Llama with biases on queries, keys and values, and windows in some layers."""

    architectures = ("Qwen2ForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Raises UnsupportedModel."""
        fields = fields.with_defaults(
            rms_norm_eps=1e-6, rope_theta=10_000.0, num_key_value_heads=32, sliding_window=4096, max_window_layers=28
        )  # fmt: skip
        return fields.model_config(qkv_bias=True, windows=windows(fields))
