"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from backends.checkpoint.families import DEFAULTS, windows
from backends.torch.layers import AnySource, Mixture
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.models.decoder import DecoderLayer, Model
from backends.torch.parallel import Parallel

EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class MixtralLayer(DecoderLayer):
    """Mistral's attention, a mixture of experts in every layer, under names of its own."""

    def make_mlp(self, config: ModelConfig, layer: int, ops: ModuleType, parallel: Parallel) -> Mixture:
        """Experts are called w1, w3 and w2."""
        return Mixture(config, ops, parallel, ("w1", "w3", "w2"))

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the layer in the checkpoint."""
        for source in super().sources(name):
            yield source._replace(name=source.name.replace(".mlp.", ".block_sparse_moe."))


class MixtralForCausalLM(Model):
    """Mistral with experts."""

    architectures = ("MixtralForCausalLM",)
    layer_class = MixtralLayer

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """Read the configuration of this family. Raises UnsupportedModel."""
        fields = fields.with_defaults(rms_norm_eps=1e-5, rope_theta=1_000_000.0, **DEFAULTS["mixtral"])
        return fields.model_config(
            windows=windows(fields, "mixtral"),
            experts=fields.size("num_local_experts"),
            top_k=fields.size("num_experts_per_tok"),
            expert_intermediate=fields.size("intermediate_size"),
        )

    def canonical(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Also takes the names that transformers 5 uses inside, and that a GGUF file is read under."""
        for one, part in super().canonical(name, tensor):
            one = one.replace(".mlp.", ".block_sparse_moe.")
            yield re.sub(r"(gate|up|down)_proj(?=\.weight$)", lambda m: EXPERT_NAMES[m[0]], one), part
