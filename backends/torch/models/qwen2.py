"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from backends.checkpoint.families import DEFAULTS, windows
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class Qwen2ForCausalLM(Model):
    """Llama with biases on queries, keys and values, and windows in some layers."""

    architectures = ("Qwen2ForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-6, rope_theta=10_000.0, **DEFAULTS["qwen2"])
        return fields.model_config(qkv_bias=True, windows=windows(fields, "qwen2"))
