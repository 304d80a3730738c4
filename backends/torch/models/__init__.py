"""The model families, one small file each, and which architecture of a config.json each one runs."""

from __future__ import annotations

from backends.torch.model_config import Fields
from backends.torch.models.decoder import Model
from backends.torch.models.llama import LlamaForCausalLM
from backends.torch.models.mistral import MistralForCausalLM
from backends.torch.models.mixtral import MixtralForCausalLM
from backends.torch.models.qwen2 import Qwen2ForCausalLM
from backends.torch.models.qwen3 import Qwen3ForCausalLM
from backends.torch.models.qwen3_moe import Qwen3MoeForCausalLM

FAMILIES: tuple[type[Model], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    MixtralForCausalLM,
)
MODELS: dict[str, type[Model]] = {name: family for family in FAMILIES for name in family.architectures}


def model_class(fields: Fields) -> type[Model]:
    """The class that runs a configuration, by the first of its ``architectures``.

    Raises UnsupportedModel when it is missing or none of :data:`MODELS`.
    """
    names = fields.values.get("architectures")
    if not names or not isinstance(names, list):
        raise fields.error("architectures", "missing")
    if names[0] not in MODELS:
        raise fields.error("architectures", f"{names[0]!r} is not supported; supported: {', '.join(MODELS)}")
    return MODELS[names[0]]
