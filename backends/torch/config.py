"""What the layers need to know of a model, read from Hugging Face's ``config.json`` or from a GGUF file's metadata.

Nothing is guessed: a field that a model needs and does not have, or a value that the layers here do not compute, raises
:class:`UnsupportedModel` with one line that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from backends.torch.fp8 import Fp8
from backends.torch.rotary import Rope

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
T = TypeVar("T", int, float, str, bool)


class UnsupportedModel(ValueError):
    """The model asks for something that the layers here do not compute, or its configuration is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a model and the variants of its layers."""

    architecture: str
    """Its class in transformers, the first of ``architectures``."""
    source: str
    """The file it was read from, for error messages."""
    hidden: int
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    intermediate: int
    """Inner size of a dense MLP."""
    vocab: int
    max_context: int
    """Tokens a sequence may have, prompt and output together."""
    rms_eps: float
    rope: Rope
    tie_word_embeddings: bool
    """The output projection is the embedding itself."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised a head at a time before they are rotated."""
    windows: tuple[int | None, ...]
    """For each layer, how many of the last tokens a token sees, itself included; None for all."""
    experts: int = 0
    """Experts of a mixture layer; 0 for a dense model."""
    top_k: int = 0
    """Experts a token goes to."""
    renormalize: bool = True
    """The weights of a token's experts add up to one."""
    expert_intermediate: int = 0
    """Inner size of one expert."""
    mixture: tuple[bool, ...]
    """For each layer, whether its MLP is a mixture of experts."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    dtype: torch.dtype | None = None
    """What the weights were saved in, or, from ``load_model``, what they are held in."""
    fp8: Fp8 | None = None
    """How the projections of attention and MLPs are held, if in FP8."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What one family alone reads."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers, before any split, in ``dtype`` (float32 if None)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (self.dtype or torch.float32).itemsize


class Fields:
    """The raw fields of one configuration, with getters whose errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        """``defaults`` are what transformers' own class assumes for fields that a file leaves out."""
        self.values, self.source, self.defaults = values, source, dict(defaults or {})

    def with_defaults(self, **defaults: Any) -> Fields:
        """The same fields, with these assumed where the file has none."""
        return Fields(self.values, self.source, {**self.defaults, **defaults})

    def error(self, field: str, why: str) -> UnsupportedModel:
        """The one line that is said about a field."""
        return UnsupportedModel(f"{self.source}: {field} {why}")

    def get(self, field: str, kind: type[T], default: T | None = None) -> T | None:
        """The field, or ``default`` where it is absent or null. Raises UnsupportedModel if it has another type."""
        value = self.values[field] if field in self.values else self.defaults.get(field)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(field, f"is {value!r}, not {_a(kind)}")
        return value

    def need(self, field: str, kind: type[T]) -> T:
        """The field. Raises UnsupportedModel where it is absent, null or of another type."""
        value = self.get(field, kind)
        if value is None:
            raise self.error(field, "is missing")
        return value

    def size(self, field: str, default: int | None = None) -> int:
        """A whole number above zero. Raises UnsupportedModel for anything else."""
        value = self.need(field, int) if default is None else self.get(field, int, default)
        assert value is not None
        if value < 1:
            raise self.error(field, f"is {value}, must be at least 1")
        return value

    def must_be(self, field: str, *allowed: Any) -> None:
        """Refuse any other value than these (the first is what absence means)."""
        value = self.values.get(field, self.defaults.get(field))
        if value is not None and value not in allowed:
            raise self.error(field, f"is {value!r}; supported: {', '.join(map(str, allowed))}")

    def model_config(
        self,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        windows: Sequence[int | None] | None = None,
        experts: int = 0,
        top_k: int = 0,
        renormalize: bool = True,
        expert_intermediate: int = 0,
        mixture: Iterable[bool] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """A configuration with the fields that every supported model has, and these that vary.

        Raises UnsupportedModel.
        """
        fp8 = self.fp8()
        if fp8 is not None and experts:
            raise self.error("quantization_config", "(fp8) is not supported for experts; use the unquantised weights")
        self.must_be("hidden_act", "silu", "swish")
        layers, hidden, heads = (
            self.size("num_hidden_layers"),
            self.size("hidden_size"),
            self.size("num_attention_heads"),
        )
        kv_heads = self.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} attention heads")
        if self.get("head_dim", int) is None and hidden % heads:
            raise self.error("head_dim", f"is missing and hidden_size {hidden} is not a multiple of {heads} heads")
        head_dim = self.size("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.error("head_dim", f"is {head_dim}; rotary embeddings need an even number")
        rope, max_context = self.rope(self.size("max_position_embeddings"))
        if experts and not 1 <= top_k <= experts:
            raise self.error("num_experts_per_tok", f"is {top_k}, with {experts} experts")
        windows = self.no_windows() if windows is None else tuple(windows)
        return ModelConfig(
            architecture=self.values["architectures"][0],
            source=self.source,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=self.size("intermediate_size"),
            vocab=self.size("vocab_size"),
            max_context=max_context,
            rms_eps=self.need("rms_norm_eps", float),
            rope=rope,
            tie_word_embeddings=bool(self.get("tie_word_embeddings", bool, False)),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            # A window that no sequence can fill hides nothing.
            windows=tuple(w if w is not None and w < max_context else None for w in windows),
            experts=experts,
            top_k=top_k,
            renormalize=renormalize,
            expert_intermediate=expert_intermediate,
            mixture=(bool(experts),) * layers if mixture is None else tuple(mixture),
            eos_token_ids=self.token_ids("eos_token_id"),
            dtype=self.dtype(),
            fp8=fp8,
            extra=extra or {},
        )

    def fp8(self) -> Fp8 | None:
        """What ``quantization_config`` says. Raises UnsupportedModel for any quantisation but FP8 weights."""
        raw = self.values.get("quantization_config")
        if raw is None:
            return None
        method = raw.get("quant_method", "unknown") if isinstance(raw, Mapping) else raw
        if not isinstance(raw, Mapping) or method != "fp8":
            raise self.error("quantization_config", f"({method}) is not supported; use the unquantised weights")
        own = Fields(raw, self.source)
        own.must_be("fmt", "e4m3")
        block = raw.get("weight_block_size")
        if block is not None:
            sizes = isinstance(block, Sequence) and [n for n in block if isinstance(n, int) and n >= 1]
            if not sizes or len(block) != 2 or len(sizes) != 2 or sizes[1] & (sizes[1] - 1 | 15):
                why = f"is {block!r}, not rows and columns (a power of two from 16 up)"
                raise self.error("quantization_config.weight_block_size", why)
            block = (sizes[0], sizes[1])
        plain = raw.get("modules_to_not_convert") or raw.get("ignored_layers") or ()
        for name in plain:
            if str(name).endswith("_proj"):
                raise self.error("quantization_config", f"leaves {name} unquantised, which is not supported")
        return Fp8(block, saved=True)

    def no_windows(self) -> tuple[None, ...]:
        """Every layer sees everything. Raises UnsupportedModel if the file says otherwise."""
        self.layer_types({"full_attention"})
        return (None,) * self.size("num_hidden_layers")

    def same_window(self) -> tuple[int | None, ...]:
        """``sliding_window`` in every layer, as Mistral and Mixtral read it. Raises UnsupportedModel."""
        window = self.get("sliding_window", int)
        kinds = self.layer_types({"sliding_attention" if window else "full_attention"})
        return (self.size("sliding_window") if window is not None else None,) * len(kinds)

    def layer_types(self, allowed: set[str], default: str = "full_attention") -> tuple[str, ...]:
        """The kind of attention of each layer. Raises UnsupportedModel for one that is not allowed."""
        layers = self.size("num_hidden_layers")
        kinds = self.values.get("layer_types")
        if kinds is None:
            return (default,) * layers
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise self.error("layer_types", f"must list {layers} layers")
        for kind in kinds:
            if kind not in allowed:
                raise self.error("layer_types", f"has {kind!r}; supported here: {', '.join(sorted(allowed))}")
        return tuple(kinds)

    def rope(self, max_position: int) -> tuple[Rope, int]:
        """(how positions turn into angles, tokens of context). Raises UnsupportedModel.

        Reads ``rope_theta`` with ``rope_scaling``, and transformers 5's ``rope_parameters``, which holds both.
        """
        field = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        raw = self.values.get(field) or {}
        if not isinstance(raw, Mapping):
            raise self.error(field, f"is {raw!r}, not an object")
        for key, value in raw.items():
            if isinstance(value, Mapping):
                raise self.error(f"{field}.{key}", "differs from layer to layer, which is not supported")
        own = {key: value for key, value in raw.items() if value is not None}
        scaling = _RopeFields(own, self.source, field)
        for place in (self, scaling):
            if place.get("partial_rotary_factor", float, 1.0) != 1.0:
                raise place.error("partial_rotary_factor", "other than 1 is not supported")
        theta = scaling.get("rope_theta", float) or self.need("rope_theta", float)
        kind = own.get("rope_type", own.get("type", "default"))
        if kind == "default":
            return Rope(theta=theta), max_position
        if kind == "linear":
            return Rope(theta=theta, kind="linear", factor=scaling.need("factor", float)), max_position
        # transformers lets the field outside win over the one inside.
        original = self.get("original_max_position_embeddings", int)
        original = original or scaling.get("original_max_position_embeddings", int, max_position)
        assert original is not None
        if kind == "llama3":
            return Rope(
                theta=theta,
                kind="llama3",
                factor=scaling.need("factor", float),
                original_context=original,
                low_freq_factor=scaling.need("low_freq_factor", float),
                high_freq_factor=scaling.need("high_freq_factor", float),
            ), max_position
        if kind == "yarn":
            factor = scaling.need("factor", float)
            rope = Rope(
                theta=theta,
                kind="yarn",
                factor=factor,
                original_context=original,
                beta_fast=scaling.get("beta_fast", float) or 32.0,
                beta_slow=scaling.get("beta_slow", float) or 1.0,
                truncate=scaling.get("truncate", bool, True) is not False,
                attention_factor=scaling.get("attention_factor", float),
                mscale=scaling.get("mscale", float),
                mscale_all_dim=scaling.get("mscale_all_dim", float),
            )
            # Qwen's instructions add yarn to a file whose max_position_embeddings still is the original context.
            return rope, max(max_position, int(original * factor))
        if kind == "divisors":
            return Rope(theta=theta, kind="divisors", divisors=tuple(own["divisors"])), max_position
        if kind == "dynamic":
            raise scaling.error(
                "rope_type", "'dynamic' changes the angles of cached keys as a sequence grows, which is not supported"
            )
        raise scaling.error("rope_type", f"is {kind!r}; supported: default, linear, llama3, yarn")

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One id or a list of them, as a tuple. Raises UnsupportedModel for anything else."""
        value = self.values.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(field, f"is {value!r}, not a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def dtype(self) -> torch.dtype | None:
        """What the weights were saved in, if the file says so. Raises UnsupportedModel for an unknown one."""
        field = "dtype" if "dtype" in self.values else "torch_dtype"
        name = self.get(field, str)
        if name is None:
            return None
        name = name.removeprefix("torch.")
        if name not in DTYPES:
            raise self.error(field, f"is {name!r}; supported: {', '.join(DTYPES)}")
        return DTYPES[name]


class _RopeFields(Fields):
    """Fields inside ``rope_scaling`` or ``rope_parameters``."""

    def __init__(self, values: Mapping[str, Any], source: str, field: str) -> None:
        super().__init__(values, source)
        self.field = field

    def error(self, field: str, why: str) -> UnsupportedModel:
        return super().error(f"{self.field}.{field}", why)


def _a(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
