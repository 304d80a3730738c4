"""Llama 2, 3, 3.1 and 3.2, and what shares their architecture (SmolLM2, Yi, TinyLlama, ...)."""

from __future__ import annotations

from backends.checkpoint.families import DEFAULTS, windows
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class LlamaForCausalLM(Model):
    """The plain decoder; attention and MLP may have biases."""

    architectures = ("LlamaForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-6, rope_theta=10_000.0, **DEFAULTS["llama"])
        bias = fields.flag("attention_bias")
        return fields.model_config(
            qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"), windows=windows(fields, "llama")
        )
