"""Qwen3, the dense models."""

from __future__ import annotations

from backends.checkpoint.families import DEFAULTS, windows
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class Qwen3ForCausalLM(Model):
    """Queries and keys are normalised head by head; heads need not add up to the hidden size."""

    architectures = ("Qwen3ForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-6, rope_theta=10_000.0, **DEFAULTS["qwen3"])
        bias = fields.flag("attention_bias")
        return fields.model_config(qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows(fields, "qwen3"))
