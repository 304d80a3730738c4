"""Models: the facts of a Hugging Face ``config.json`` that a cost model needs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from backends.checkpoint.config_fields import UnsupportedModel
from backends.checkpoint.families import context_tokens, drafting_layers
from backends.checkpoint.layer_kinds import Attention, Dense, Experts, Latent, Layer, Mixer, Recurrent
from backends.checkpoint.precision import (
    DTYPE_BYTES,
    Precision,
    as_precision,
    named,
    read_kv_dtype,
    read_precision,
)
from backends.checkpoint.readers import read_fields, read_stack
from backends.simulated.catalogue.gpu_specs import CatalogueError
from ground.json_file import read_json

CATALOGUE = Path(__file__).parent / "models.json"
"""Fields of each model's published config.json that change something, by Hugging Face id."""


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder-only language model."""

    name: str
    kind: str
    """Its ``model_type``, or the one that its language model is the same as."""
    hidden: int
    vocab: int
    max_context: int
    tied_embeddings: bool
    stack: tuple[Layer, ...]
    vectors: int = 0
    """Elements of the norm after the last layer, and of a bias of the output projection."""
    drafting_layers: int = 0
    """Layers that draft further tokens, which engines load for speculation alone; nothing here counts them."""
    saved: Precision | str = field(default_factory=lambda: named("bf16", "nothing in its configuration"))
    """Precision of the checkpoint's weights, or the line about why it is not known."""
    saved_kv: str | None = None
    """Dtype that the checkpoint has scales of KV for; None where it has none."""
    kv_problem: str | None = None
    """The line about scales of KV that are not modelled."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.stack)

    @property
    def made_of(self) -> str:
        """What its layers are made of, as in ``experts, windows``: what makes models alike to a cost model."""
        mixers = [layer.mixer for layer in self.stack]
        parts = {
            "latent attention": any(isinstance(mixer, Latent) for mixer in mixers),
            "linear attention": any(isinstance(mixer, Recurrent) for mixer in mixers),
            "experts": self.routed is not None,
            "dense": self.routed is None,
            "windows": any(window is not None for window in self.windows),
        }
        return ", ".join(part for part, has in parts.items() if has)

    @cached_property
    def _first(self) -> Attention | Latent | None:
        """The first layer of attention."""
        return next((each.mixer for each in self.stack if isinstance(each.mixer, Attention | Latent)), None)

    @property
    def heads(self) -> int:
        """Query heads of the first layer of attention, 0 without any."""
        return 0 if self._first is None else self._first.heads

    @property
    def kv_heads(self) -> int:
        """KV heads of the first layer of attention, 0 without any; a latent serves all query heads."""
        return self._first.kv_heads if isinstance(self._first, Attention) else self.heads

    @property
    def head_dim(self) -> int:
        """Width of the keys of those."""
        first = self._first
        if isinstance(first, Attention):
            return first.head_dim
        return 0 if first is None else first.qk_nope_head_dim + first.qk_rope_head_dim

    @property
    def mla(self) -> Latent | None:
        """The first layer of attention, where it is over latents."""
        return self._first if isinstance(self._first, Latent) else None

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in tokens; None for one that has none."""
        return tuple(each.mixer.window if isinstance(each.mixer, Attention) else None for each in self.stack)

    @cached_property
    def moe_layers(self) -> tuple[bool, ...]:
        """Whether each layer is a mixture of experts."""
        return tuple(isinstance(each.mlp, Experts) for each in self.stack)

    @cached_property
    def routed(self) -> Experts | None:
        """The experts of the first layer that has any."""
        return next((each.mlp for each in self.stack if isinstance(each.mlp, Experts)), None)

    @cached_property
    def dense(self) -> Dense | None:
        """The MLP of the first layer that has a dense one."""
        return next((each.mlp for each in self.stack if isinstance(each.mlp, Dense)), None)

    @property
    def intermediate(self) -> int:
        """Inner width of dense MLPs, 0 without any."""
        return 0 if self.dense is None else self.dense.width

    @property
    def gated_mlp(self) -> bool:
        """Whether dense MLPs multiply two projections."""
        return self.dense is None or self.dense.gated

    @property
    def experts(self) -> int:
        """Routed experts of a layer, 0 without any."""
        return 0 if self.routed is None else self.routed.count

    @property
    def experts_per_token(self) -> int:
        """How many of them a token uses."""
        return 0 if self.routed is None else self.routed.per_token

    @property
    def expert_intermediate(self) -> int:
        """Inner width of a routed expert."""
        return 0 if self.routed is None else self.routed.width

    @cached_property
    def recurrent_layers(self) -> int:
        """How many layers have a recurrence."""
        return sum(isinstance(each.mixer, Recurrent) for each in self.stack)

    @cached_property
    def sparse_layers(self) -> int:
        """How many layers attend to chosen tokens."""
        return sum(isinstance(each.mixer, Latent) and each.mixer.topk is not None for each in self.stack)

    @cached_property
    def beyond_tables(self) -> str | None:
        """What its layers have that no profile holds, in words; None where all have one kind of attention to all tokens."""
        mixers = {each.mixer for each in self.stack}
        if any(isinstance(each, Attention) and each.window is not None for each in mixers):
            return "attends over sliding windows"
        if any(each is not None and not isinstance(each, Attention | Latent) for each in mixers):
            return "has recurrent layers"
        if any(isinstance(each, Latent) and each.topk is not None for each in mixers):
            return "has sparse attention over chosen tokens"
        mlps = {each.mlp for each in self.stack}
        if (
            len(mixers) > 1
            or None in mlps
            or any(sum(isinstance(e, kind) for e in mlps) > 1 for kind in (Dense, Experts))
        ):
            return "has layers of several shapes"
        if self.routed is not None and (not self.routed.gated or self.routed.latent is not None):
            return "has experts without gates or of a latent width"
        return None

    def precision(self, dtype: str = "auto") -> Precision:
        """Name how weights are held: ``auto`` as they were saved, else as the word says. Raises :class:`CatalogueError`."""
        if dtype != "auto":
            return named(dtype)
        if isinstance(self.saved, str):
            raise CatalogueError(f"{self.saved}; --dtype says what to count its weights as")
        return self.saved

    def kv_dtype(self, computes: str) -> str:
        """Name what the checkpoint has scales of KV for, else ``computes``. Raises :class:`CatalogueError`."""
        if self.kv_problem is not None:
            raise CatalogueError(f"{self.kv_problem}; --kv-dtype says what to count KV as")
        return self.saved_kv or computes

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that cannot be shared out over ``tp`` GPUs; None if all can. With fewer KV heads than GPUs,
        neighbours hold the same one."""
        for mixer in dict.fromkeys(each.mixer for each in self.stack):
            if mixer is not None and (found := mixer.unsplit(tp)) is not None:
                return found
        return None

    @property
    def parameters(self) -> int:
        """All weights, but for layers that draft."""
        return self._outside() + sum(each.parameters(self.hidden) for each in self.stack)

    @property
    def all_vectors(self) -> int:
        """Those of them that are no matrices: norms, biases, convolutions; below a thousandth."""
        return self.vectors + sum(each.all_vectors for each in self.stack)

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through, embeddings included as in the published figures."""
        return self._outside() + sum(each.parameters(self.hidden, active=True) for each in self.stack)

    def _outside(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2) + self.vectors

    def stage_layers(self, pp: int, stage: int) -> range:
        """Consecutive layers of a pipeline stage; what does not divide goes to the first stages."""
        each, more = divmod(self.layers, pp)
        first = stage * each + min(stage, more)
        return range(first, first + each + (stage < more))

    def stage_stack(self, pp: int, stage: int) -> tuple[Layer, ...]:
        """The same, as layers."""
        return tuple(self.stack[layer] for layer in self.stage_layers(pp, stage))

    def weight_bytes(self, dtype: str | Precision, tp: int = 1, pp: int = 1, ep: int = 1, stage: int = 0) -> float:
        """Bytes of matrices on one GPU of a stage; vectors, below a thousandth, are left out. Routed experts are spread over
        max(tp, ep) GPUs, shared ones over tp, and every GPU has the router and what has no heads of attention; embeddings
        and the output head are on the first and last stage, split by tp."""
        weights, total, ranks = as_precision(dtype), 0.0, max(tp, ep)
        for layer in self.stage_stack(pp, stage):
            for part, elements in layer.elements(self.hidden).items():
                held = elements / (ranks if part == "experts" else 1 if part == "router" else tp)
                if layer.mixer is not None and part == layer.mixer.part:
                    held = layer.mixer.held_elements(self.hidden, tp)
                total += held * (weights.plain.bytes if part == "router" else weights.bytes_of(part))
        table = self.vocab * self.hidden / tp
        if stage == 0:
            total += table * weights.plain.bytes
        if stage == pp - 1 and not (self.tied_embeddings and pp == 1):
            total += table * (weights.plain.bytes if self.tied_embeddings else weights.bytes_of("head"))
        return total

    def kv_bytes_per_token(self, kv_dtype: str = "bf16", tp: int = 1, pp: int = 1, stage: int = 0) -> float:
        """Bytes of KV a token on one GPU, where every layer of attention keeps every token."""
        return sum(layer_kv_bytes(layer.mixer, kv_dtype, tp) for layer in self.stage_stack(pp, stage))

    def state_bytes(self, tp: int = 1, pp: int = 1, stage: int = 0) -> float:
        """Bytes of the states of recurrent layers, a request, on one GPU."""
        return sum(layer_state_bytes(layer.mixer, tp) for layer in self.stage_stack(pp, stage))


def layer_kv_bytes(mixer: Mixer | None, kv_dtype: str, tp: int) -> float:
    """Bytes a layer of attention keeps of a token on one GPU; none where there is no attention."""
    if isinstance(mixer, Attention):
        return mixer.kv_elements(tp) * DTYPE_BYTES[kv_dtype]
    if isinstance(mixer, Latent):
        if mixer.topk is not None and kv_dtype == "fp8":
            # The layout that sparse kernels read: the latent in 8 bits with a scale of 4 bytes for each 128, and the rotary
            # part in 16 (vLLM 0.33.0, v1/kv_cache_interface.py, MLAAttentionSpec: 656 bytes).
            return (
                mixer.kv_lora_rank + 4 * -(-mixer.kv_lora_rank // 128) + 2 * mixer.qk_rope_head_dim + mixer.index_bytes
            )
        return mixer.kv_elements(tp) * DTYPE_BYTES[kv_dtype] + mixer.index_bytes
    return 0.0


def layer_state_bytes(mixer: Mixer | None, tp: int) -> float:
    """Bytes of a request's state in a recurrent layer on one GPU: the state, and the last inputs of its convolution in two
    bytes; none where there is no recurrence."""
    if not isinstance(mixer, Recurrent):
        return 0.0
    return (mixer.state_elements * mixer.state_bytes + 2 * mixer.conv_channels * (mixer.conv_kernel - 1)) / tp


def load_model(name: str) -> ModelSpec:
    """A model of the catalogue by Hugging Face id (the organisation may be left out), or a folder with, or path of, a
    config.json. Raises :class:`CatalogueError` in one line for anything else."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        config = _with_quantisation(read_json(path, CatalogueError), path)
        return from_config(config, path.parent.name or str(path), str(path))
    for wanted in (name.lower(), _canonical(name)):
        for known, config in _catalogue().items():
            if wanted in (known.lower(), _canonical(known)):
                return from_config(config, known, CATALOGUE.name)
    short = [known for known in _catalogue() if _canonical(known).split("/")[1] == wanted]
    if len(short) == 1:
        return from_config(_catalogue()[short[0]], short[0], CATALOGUE.name)
    near = difflib.get_close_matches(wanted, {known.lower(): 0 for known in _catalogue()}, 3, 0.4)
    names = [known for known in _catalogue() if known.lower() in near]
    hint = (
        f"nearest: {', '.join(names)}" if names else f"workbench catalogue lists the {len(_catalogue())} that there are"
    )
    raise CatalogueError(f"unknown model {name!r}; {hint} (or a folder or config.json)")


def _with_quantisation(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config.json with what NVIDIA's tools write beside it of its precision, where it says nothing itself."""
    beside = path.with_name(path.name.replace("config.json", "hf_quant_config.json"))
    if config.get("quantization_config") or beside == path or not beside.is_file():
        return config
    return {**config, "quantization_config": read_json(beside, CatalogueError)}


def same_model(one: str, other: str) -> bool:
    """Tell whether two names mean models of one shape: the organisation and what was trained last do not count."""
    return _canonical(one).rsplit("/", 1)[-1] == _canonical(other).rsplit("/", 1)[-1]


def model_names() -> list[str]:
    """Ids of the catalogue."""
    return list(_catalogue())


def _canonical(name: str) -> str:
    """Llama 3.1 has been renamed once, and instruct variants and later releases have the shape of the base model."""
    return re.sub(r"-(instruct|thinking|base|it)(-\d{4})?$", "", name.lower()).replace("meta-llama-3", "llama-3")


@cache
def _catalogue() -> dict[str, Any]:
    return read_json(CATALOGUE)


def from_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """Read a config.json. Raises :class:`CatalogueError` naming ``where`` and the field that is missing, wrong or not
    supported."""
    try:
        return _read(config, name, where)
    except UnsupportedModel as error:
        raise CatalogueError(str(error)) from error


def _read(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    fields, kind = read_fields(config, where)
    stack = read_stack(fields, kind)
    hidden, max_context = fields.size("hidden_size"), context_tokens(fields)
    saved: Precision | str
    try:
        saved = read_precision(fields, stack.layers, hidden)
    except UnsupportedModel as error:
        saved = str(error)
    saved_kv, kv_problem = None, None
    try:
        saved_kv = read_kv_dtype(fields)
    except UnsupportedModel as error:
        kv_problem = str(error)
    return ModelSpec(
        name=name,
        kind=kind,
        hidden=hidden,
        vocab=fields.size("vocab_size"),
        max_context=max_context,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        stack=tuple(_within(layer, max_context) for layer in stack.layers),
        vectors=stack.vectors,
        drafting_layers=drafting_layers(fields),
        saved=saved,
        saved_kv=saved_kv,
        kv_problem=kv_problem,
    )


def _within(layer: Layer, max_context: int) -> Layer:
    """The layer without a window that no sequence can fill: it hides nothing."""
    mixer = layer.mixer
    if not isinstance(mixer, Attention) or mixer.window is None or mixer.window < max_context:
        return layer
    return replace(layer, mixer=replace(mixer, window=None, chunked=False))
