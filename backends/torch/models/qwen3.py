"""Qwen3, the dense models."""

from __future__ import annotations

from backends.torch.config import Fields, ModelConfig
from backends.torch.models.decoder import Model
from backends.torch.models.qwen2 import windows


class Qwen3ForCausalLM(Model):
    """Queries and keys are normalised head by head; heads need not add up to the hidden size."""

    architectures = ("Qwen3ForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Raises UnsupportedModel."""
        fields = fields.with_defaults(
            rms_norm_eps=1e-6, rope_theta=10_000.0, num_key_value_heads=32, head_dim=128, sliding_window=4096,
            max_window_layers=28,
        )  # fmt: skip
        bias = bool(fields.get("attention_bias", bool))
        return fields.model_config(qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows(fields))
