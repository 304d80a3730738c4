"""Mistral 7B and its successors of the same architecture."""

from __future__ import annotations

from backends.checkpoint.families import DEFAULTS, windows
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class MistralForCausalLM(Model):
    """Llama without biases, and with one sliding window in every layer where the configuration has one."""

    architectures = ("MistralForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-6, rope_theta=10_000.0, **DEFAULTS["mistral"])
        return fields.model_config(windows=windows(fields, "mistral"))
