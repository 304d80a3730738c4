"""Configuration of a model's layers, read from Hugging Face's ``config.json`` or from a GGUF file's metadata.

Nothing is guessed: a field that a model needs and does not have, or a value that the layers here do not compute, raises
:class:`UnsupportedModel` with one line that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from backends.checkpoint import config_fields as checkpoint
from backends.checkpoint import families
from backends.checkpoint.config_fields import UnsupportedModel as UnsupportedModel  # said by callers, too
from backends.checkpoint.families import context_tokens, rope_field
from backends.checkpoint.precision import block_size, quant_method
from backends.torch.fp8 import Fp8
from backends.torch.rotary import Rope


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


class Fields(checkpoint.Fields):
    """The raw fields of one configuration, and the configuration that they make."""

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
            raise self.error("quantization_config", "fp8 is not supported for experts; use the unquantised weights")
        self.must_be("hidden_act", "silu", "swish")
        layers, hidden, heads = (
            self.size("num_hidden_layers"),
            self.size("hidden_size"),
            self.size("num_attention_heads"),
        )
        kv_heads, head_dim = families.kv_heads(self), families.head_dim(self)
        if head_dim % 2:
            raise self.error("head_dim", f"{head_dim} is odd; rotary embeddings need an even number")
        rope, max_context = self.rope(self.size("max_position_embeddings"))
        if experts and not 1 <= top_k <= experts:
            raise self.error("num_experts_per_tok", f"{top_k}, with {experts} experts")
        windows = (None,) * layers if windows is None else tuple(windows)
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
        """Return what ``quantization_config`` says. Raises UnsupportedModel for any quantisation but FP8 weights."""
        raw = self.object("quantization_config")
        if not raw:
            return None
        method = quant_method(self)
        if method != "fp8":
            raise self.error("quantization_config", f"{method} is not supported; use the unquantised weights")
        own = Fields(raw, self.source)
        own.must_be("fmt", "e4m3")
        block = block_size(own)
        if block is not None and block[1] & (block[1] - 1 | 15):
            why = f"{list(block)} is not rows and columns (a power of two from 16 up)"
            raise self.error("quantization_config.weight_block_size", why)
        for name in own.texts("modules_to_not_convert", "ignored_layers"):
            if name.endswith("_proj"):
                raise self.error("quantization_config", f"leaves {name} unquantised, which is not supported")
        return Fp8(block, saved=True)

    def rope(self, max_position: int) -> tuple[Rope, int]:
        """(how positions turn into angles, tokens of context). Raises UnsupportedModel.

        Reads ``rope_theta`` with ``rope_scaling``, and transformers 5's ``rope_parameters``, which holds both.
        """
        field = rope_field(self)
        raw = self.object(field)
        for key, value in raw.items():
            if isinstance(value, Mapping):
                raise self.error(f"{field}.{key}", "differs from layer to layer, which is not supported")
        own = {key: value for key, value in raw.items() if value is not None}
        scaling = checkpoint.Inner(own, self.source, field)
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
            return rope, context_tokens(self)
        if kind == "divisors":
            return Rope(theta=theta, kind="divisors", divisors=tuple(own["divisors"])), max_position
        if kind == "dynamic":
            raise scaling.error(
                "rope_type", "'dynamic' changes the angles of cached keys as a sequence grows, which is not supported"
            )
        raise scaling.error("rope_type", f"{kind!r} is not supported; supported: default, linear, llama3, yarn")

    def dtype(self) -> torch.dtype | None:
        """Return what the weights were saved in, if the file says so. Raises UnsupportedModel for an unknown one."""
        name = self.dtype_name()
        return None if name is None else getattr(torch, name)
