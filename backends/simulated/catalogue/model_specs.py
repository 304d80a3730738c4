"""Models: the facts of a Hugging Face ``config.json`` that a cost model needs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from backends.checkpoint.config_fields import Fields, UnsupportedModel
from backends.checkpoint.families import (
    DEFAULTS,
    context_tokens,
    experts,
    head_dim,
    kv_heads,
    mixtures,
    text_values,
    windows,
)
from backends.checkpoint.precision import DTYPE_BYTES, Precision, as_precision, named, read_precision
from backends.simulated.catalogue.gpu_specs import CatalogueError
from ground.json_file import read_json

CATALOGUE = Path(__file__).parent / "models.json"
"""Fields of each model's published config.json that are read below, by Hugging Face id."""


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder-only transformer."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_context: int
    tied_embeddings: bool
    moe_layers: tuple[bool, ...]
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None is full attention."""
    gated_mlp: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_expert_intermediate: int = 0
    """Inner width of all shared experts together."""
    mla: MLA | None = None
    saved: Precision | str = field(default_factory=lambda: named("bf16", "nothing in its configuration"))
    """Precision of the checkpoint's weights, or the line about why it is not known."""

    def precision(self, dtype: str = "auto") -> Precision:
        """Name how weights are held: ``auto`` as they were saved, else as the word says. Raises :class:`CatalogueError`."""
        if dtype != "auto":
            return named(dtype)
        if isinstance(self.saved, str):
            raise CatalogueError(f"{self.saved}; --dtype says what to count its weights as")
        return self.saved

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that cannot be shared out over ``tp`` GPUs; None if all can. With fewer KV heads than GPUs,
        neighbours hold the same one."""
        if self.heads % tp:
            return f"{self.heads} attention heads"
        shared = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        return None if shared else f"{self.kv_heads} KV heads"

    def attention_parameters(self) -> int:
        """Weights of one layer's projections."""
        if self.mla is None:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        m = self.mla
        query = self.heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        q = self.hidden * query if m.q_lora_rank is None else m.q_lora_rank * (self.hidden + query)
        kv = self.hidden * (m.kv_lora_rank + m.qk_rope_head_dim)
        kv += m.kv_lora_rank * self.heads * (m.qk_nope_head_dim + m.v_head_dim)
        return q + kv + self.heads * m.v_head_dim * self.hidden

    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.expert_intermediate

    def mlp_parameters(self, layer: int, *, active: bool = False) -> int:
        """Weights of a layer's MLP or experts; ``active`` counts those one token uses."""
        if not self.moe_layers[layer]:
            return (3 if self.gated_mlp else 2) * self.hidden * self.intermediate
        used = self.experts_per_token if active else self.experts
        shared = 3 * self.hidden * self.shared_expert_intermediate
        return used * self.expert_parameters() + shared + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        """All weights (biases and norms, below a thousandth, are left out)."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + sum(self.attention_parameters() + self.mlp_parameters(i) for i in range(self.layers))

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through, embeddings included as in the published figures."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        layers = range(self.layers)
        return embeddings + sum(self.attention_parameters() + self.mlp_parameters(i, active=True) for i in layers)

    def stage_layers(self, pp: int, stage: int) -> range:
        """Consecutive layers of a pipeline stage; what does not divide goes to the first stages."""
        each, more = divmod(self.layers, pp)
        first = stage * each + min(stage, more)
        return range(first, first + each + (stage < more))

    def weight_bytes(self, dtype: str | Precision, tp: int = 1, pp: int = 1, ep: int = 1, stage: int = 0) -> float:
        """Bytes of weights on one GPU of a stage. Experts are spread over max(tp, ep) GPUs; embeddings and the output
        head are on the first and last stage, split by tp."""
        weights, total = as_precision(dtype), 0.0
        for layer in self.stage_layers(pp, stage):
            total += self.attention_parameters() / tp * weights.bytes_of("attention")
            if not self.moe_layers[layer]:
                total += self.mlp_parameters(layer) / tp * weights.bytes_of("mlp")
                continue
            ranks = max(tp, ep)
            total += self.experts * self.expert_parameters() / ranks * weights.bytes_of("experts")
            shared = 3 * self.hidden * self.shared_expert_intermediate
            total += shared / ranks * weights.bytes_of("shared_experts")
            total += self.hidden * self.experts / ranks * weights.plain.bytes
        table = self.vocab * self.hidden / tp
        if stage == 0:
            total += table * weights.plain.bytes
        if stage == pp - 1 and not (self.tied_embeddings and pp == 1):
            total += table * (weights.plain.bytes if self.tied_embeddings else weights.bytes_of("head"))
        return total

    def kv_bytes_per_token(self, kv_dtype: str = "bf16", tp: int = 1, pp: int = 1, stage: int = 0) -> float:
        """Bytes of KV a token on one GPU. KV heads are copied when there are fewer than GPUs; a latent is never split."""
        if self.mla is not None:
            elements: float = self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        else:
            elements = 2 * max(self.kv_heads / tp, 1) * self.head_dim
        return len(self.stage_layers(pp, stage)) * elements * DTYPE_BYTES[kv_dtype]


def load_model(name: str) -> ModelSpec:
    """A model of the catalogue by Hugging Face id (the organisation may be left out), or a folder with, or path of, a
    config.json. Raises :class:`CatalogueError` in one line for anything else."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return from_config(read_json(path, CatalogueError), path.parent.name or str(path), str(path))
    for wanted in (name.lower(), _canonical(name)):
        for known, config in _catalogue().items():
            if wanted in (known.lower(), _canonical(known)):
                return from_config(config, known, CATALOGUE.name)
    short = [known for known in _catalogue() if _canonical(known).split("/")[1] == wanted]
    if len(short) == 1:
        return from_config(_catalogue()[short[0]], short[0], CATALOGUE.name)
    near = difflib.get_close_matches(wanted, {known.lower(): 0 for known in _catalogue()}, 3, 0.4)
    names = [known for known in _catalogue() if known.lower() in near]
    hint = f"nearest: {', '.join(names)}" if names else f"known: {', '.join(_catalogue())}"
    raise CatalogueError(f"unknown model {name!r}; {hint} (or a folder or config.json)")


def same_model(one: str, other: str) -> bool:
    """Tell whether two names mean models of one shape: the organisation and what was trained last do not count."""
    return _canonical(one).rsplit("/", 1)[-1] == _canonical(other).rsplit("/", 1)[-1]


def model_names() -> list[str]:
    """Ids of the catalogue."""
    return list(_catalogue())


def _canonical(name: str) -> str:
    """Llama 3.1 has been renamed once, and instruct variants and later releases have the shape of the base model."""
    return re.sub(r"-(instruct|thinking|base)(-\d{4})?$", "", name.lower()).replace("meta-llama-3", "llama-3")


@cache
def _catalogue() -> dict[str, Any]:
    return read_json(CATALOGUE)


def from_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """Read a config.json. Raises :class:`CatalogueError` naming ``where`` and the field that is missing, wrong or not
    supported."""
    try:
        return _read(Fields(text_values(config, where), where), name)
    except UnsupportedModel as error:
        raise CatalogueError(str(error)) from error


def _read(fields: Fields, name: str) -> ModelSpec:
    kind = fields.need("model_type", str)
    if kind not in DEFAULTS:
        raise fields.error("model_type", f"{kind!r} is not supported; known: {', '.join(DEFAULTS)}")
    fields = fields.with_defaults(**DEFAULTS[kind])
    layers, hidden, heads = (
        fields.size("num_hidden_layers"),
        fields.size("hidden_size"),
        fields.size("num_attention_heads"),
    )
    routed, intermediate = experts(fields), fields.size("intermediate_size")
    expert_intermediate = fields.size("moe_intermediate_size", intermediate) if routed else 0
    per_token = fields.size("num_experts_per_tok") if routed else 0
    if per_token > routed:
        raise fields.error("num_experts_per_tok", f"{per_token}, with {routed} experts")
    mla = None
    if fields.raw("kv_lora_rank") is not None:
        mla = MLA(
            fields.size("q_lora_rank") if fields.raw("q_lora_rank") is not None else None,
            fields.size("kv_lora_rank"),
            fields.size("qk_nope_head_dim"),
            fields.size("qk_rope_head_dim"),
            fields.size("v_head_dim"),
        )
    max_context = context_tokens(fields)
    saved: Precision | str
    try:
        saved = read_precision(fields, layers)
    except UnsupportedModel as error:
        saved = str(error)
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads(fields),
        head_dim=head_dim(fields),
        intermediate=intermediate,
        vocab=fields.size("vocab_size"),
        max_context=max_context,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        moe_layers=mixtures(fields, routed),
        # A window that no sequence can fill hides nothing.
        windows=tuple(w if w is not None and w < max_context else None for w in windows(fields, kind)),
        experts=routed,
        experts_per_token=per_token,
        expert_intermediate=expert_intermediate,
        shared_expert_intermediate=fields.count("n_shared_experts") * expert_intermediate if routed else 0,
        mla=mla,
        saved=saved,
    )
