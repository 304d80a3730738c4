"""Models: the facts of a Hugging Face ``config.json`` that a cost model needs."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from backends.simulated.hardware import CatalogueError
from backends.simulated.json_file import read_object

DTYPE_BYTES: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5 + 2 / 128}
"""Bytes a weight or a KV element. int4 counts a 2-byte scale for every 128 weights."""
CATALOGUE = Path(__file__).parent / "models.json"
"""By Hugging Face id, the fields of each model's published config.json that are read below."""
SUPPORTED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss",
             "gemma2", "phi3", "olmo2", "smollm3", "granite")  # fmt: skip


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
    """Of all shared experts together."""
    mla: MLA | None = None

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

    def weight_bytes(self, dtype: str, tp: int = 1, pp: int = 1, ep: int = 1, stage: int = 0) -> float:
        """Bytes of weights on one GPU of a stage. Experts are spread over max(tp, ep) GPUs; embeddings and the output
        head, on the first and last stage and split by tp, stay 2 bytes when the rest is quantised."""
        matrices = 0.0
        for layer in self.stage_layers(pp, stage):
            matrices += self.attention_parameters() / tp
            matrices += self.mlp_parameters(layer) / (max(tp, ep) if self.moe_layers[layer] else tp)
        ends = (stage == 0) + (stage == pp - 1)
        if self.tied_embeddings and pp == 1:
            ends = 1
        return matrices * DTYPE_BYTES[dtype] + ends * self.vocab * self.hidden / tp * max(DTYPE_BYTES[dtype], 2)

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
        return from_config(read_object(path, CatalogueError), path.parent.name or str(path), str(path))
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
    """Whether two names mean models of one shape: the organisation and what was trained last do not count."""
    return _canonical(one).rsplit("/", 1)[-1] == _canonical(other).rsplit("/", 1)[-1]


def model_names() -> list[str]:
    """Ids of the catalogue."""
    return list(_catalogue())


def _canonical(name: str) -> str:
    """Llama 3.1 has been renamed once, and instruct variants and later releases have the shape of the base model."""
    return re.sub(r"-(instruct|thinking|base)(-\d{4})?$", "", name.lower()).replace("meta-llama-3", "llama-3")


@cache
def _catalogue() -> dict[str, Any]:
    return json.loads(CATALOGUE.read_text())


def from_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """Read a config.json. Raises :class:`CatalogueError` naming ``where`` and the field that is missing, wrong or not
    supported."""
    config = {**config, **config.get("text_config", {})}
    kind = config.get("model_type", "missing")
    if kind not in SUPPORTED:
        raise CatalogueError(f"{where}: model_type: {kind!r} is not supported; known: {', '.join(SUPPORTED)}")

    def number(field: str, default: int | None = None) -> int:
        value = config.get(field)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problem = "missing" if value is None else f"{value!r} is not a positive whole number"
            raise CatalogueError(f"{where}: {field}: {problem}")
        return value

    layers, hidden, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    intermediate = number("intermediate_size")
    expert_intermediate = number("moe_intermediate_size", intermediate) if experts else 0
    mla = None
    if config.get("kv_lora_rank"):
        mla = MLA(
            config.get("q_lora_rank"), number("kv_lora_rank"), number("qk_nope_head_dim"), number("qk_rope_head_dim"),
            number("v_head_dim"),
        )  # fmt: skip
    return ModelSpec(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(hidden // heads, 1)), intermediate=intermediate, vocab=number("vocab_size"),
        max_context=number("max_position_embeddings"), tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        moe_layers=_moe_layers(config, layers, experts), windows=_windows(config, layers, where), experts=experts,
        experts_per_token=number("num_experts_per_tok") if experts else 0, expert_intermediate=expert_intermediate,
        shared_expert_intermediate=(config.get("n_shared_experts") or 0) * expert_intermediate, mla=mla,
    )  # fmt: skip


def _moe_layers(config: dict[str, Any], layers: int, experts: int) -> tuple[bool, ...]:
    if not experts:
        return (False,) * layers
    first = config.get("first_k_dense_replace") or 0
    every = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1
    dense = set(config.get("mlp_only_layers") or ())
    if "decoder_sparse_step" in config:
        return tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
    return tuple(i >= first and i % every == 0 and i not in dense for i in range(layers))


def _windows(config: dict[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    types = config.get("layer_types")
    if isinstance(types, str):  # the catalogue writes the repeating pattern
        pattern = types.split(",")
        types = [pattern[i % len(pattern)] for i in range(layers)]
    other = sorted({kind for kind in types or () if kind not in ("full_attention", "sliding_attention")})
    if other:
        raise CatalogueError(
            f"{where}: layer_types: {other[0]!r} is not modelled; full_attention and sliding_attention are"
        )
    window = config.get("sliding_window")
    # Qwen's configurations carry a window that is off unless they say otherwise.
    used = config.get("use_sliding_window", not config["model_type"].startswith("qwen"))
    if not window or not used:
        return (None,) * layers
    if types is not None:
        if len(types) != layers:
            raise CatalogueError(f"{where}: layer_types: {len(types)} entries for {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if config["model_type"] == "gemma2":
        return tuple(window if i % 2 == 0 else None for i in range(layers))
    return (window,) * layers
