"""Qwen3 mixtures of experts, such as Qwen3-30B-A3B."""

from __future__ import annotations

from backends.torch.config import Fields, ModelConfig
from backends.torch.models.decoder import Model


class Qwen3MoeForCausalLM(Model):
    """Qwen3 whose MLPs are mixtures of experts, in all layers or in some."""

    architectures = ("Qwen3MoeForCausalLM",)

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Raises UnsupportedModel."""
        fields = fields.with_defaults(
            rms_norm_eps=1e-6, rope_theta=10_000.0, num_key_value_heads=4, sliding_window=4096,
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        )  # fmt: skip
        bias = bool(fields.get("attention_bias", bool))
        # transformers 5 writes num_local_experts; the published checkpoints have num_experts.
        experts = fields.size("num_local_experts" if "num_local_experts" in fields.values else "num_experts")
        step = fields.size("decoder_sparse_step", 1)
        dense = fields.values.get("mlp_only_layers") or []
        layers = range(fields.size("num_hidden_layers"))
        windows = fields.same_window() if fields.get("use_sliding_window", bool) else fields.no_windows()
        return fields.model_config(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
            windows=windows,
            experts=experts,
            top_k=fields.size("num_experts_per_tok"),
            renormalize=bool(fields.get("norm_topk_prob", bool)),
            expert_intermediate=fields.size("moe_intermediate_size"),
            mixture=[layer not in dense and (layer + 1) % step == 0 for layer in layers],
        )
