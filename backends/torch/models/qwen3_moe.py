"""Qwen3 mixtures of experts, such as Qwen3-30B-A3B."""

from __future__ import annotations

from backends.checkpoint.families import DEFAULTS, experts, mixtures, windows
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class Qwen3MoeForCausalLM(Model):
    """Qwen3 whose MLPs are mixtures of experts, in all layers or in some."""

    architectures = ("Qwen3MoeForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-6, rope_theta=10_000.0, **DEFAULTS["qwen3_moe"])
        bias, count = fields.flag("attention_bias"), experts(fields)
        return fields.model_config(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
            windows=windows(fields, "qwen3_moe"),
            experts=count,
            top_k=fields.size("num_experts_per_tok"),
            renormalize=fields.flag("norm_topk_prob"),
            expert_intermediate=fields.size("moe_intermediate_size"),
            mixture=mixtures(fields, count),
        )
