"""The decoder that every supported family is a variant of, and how a checkpoint fills it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from backends.torch.forward_batch import ForwardBatch, KVPool
from backends.torch.fp8 import DTYPE as FP8
from backends.torch.layers import MLP, AnySource, Attention, Fp8Source, Mixture, RMSNorm, Vocabulary, kv_head_share
from backends.torch.model_config import Fields, ModelConfig
from backends.torch.parallel import Parallel
from backends.torch.rotary import cos_sin_table
from ground.errors import InputError


class BadCheckpoint(InputError):
    """The tensors of a checkpoint are not those that the model's configuration asks for."""


class DecoderLayer(nn.Module):
    """Attention, then an MLP or a mixture of experts, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, ops: ModuleType, parallel: Parallel) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden, config.rms_eps, ops)
        self.attention = Attention(config, layer, ops, parallel)
        self.post_attention_norm = RMSNorm(config.hidden, config.rms_eps, ops)
        self.mlp = self.make_mlp(config, layer, ops, parallel)

    def make_mlp(self, config: ModelConfig, layer: int, ops: ModuleType, parallel: Parallel) -> MLP | Mixture:
        """The second half of the layer."""
        return (Mixture if config.mixture[layer] else MLP)(config, ops, parallel)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, keys: Tensor, values: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what this layer adds, the stream it is to be added to), both [n, hidden]; the sum is fused into a norm."""
        if residual is None:
            residual, x = x, self.input_norm(x)
        else:
            x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, batch, keys, values, cos_sin)
        x, residual = self.post_attention_norm.add(x, residual)
        return self.mlp(x), residual

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the layer in the checkpoint."""
        yield from self.input_norm.sources(f"{name}.input_layernorm")
        yield from self.attention.sources(f"{name}.self_attn")
        yield from self.post_attention_norm.sources(f"{name}.post_attention_layernorm")
        yield from self.mlp.sources(f"{name}.mlp")


class Model(nn.Module):
    """One rank's share of one pipeline stage of a decoder-only model.

    A family subclasses it: it says which architectures it is, reads their configuration, and changes what differs.
    Parameters are made on torch's default device and in its default dtype, unfilled.
    """

    architectures: ClassVar[tuple[str, ...]]
    """Names in ``architectures`` of a config.json that this class runs."""
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """The configuration of this family. Raises UnsupportedModel."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, ops: ModuleType, parallel: Parallel) -> None:
        """Build this rank's share. Raises UnsupportedModel where the model cannot be split as ``parallel`` says."""
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.embedding: Vocabulary | None = None
        self.head: Vocabulary | None = None
        if parallel.first_stage:
            self.embedding = Vocabulary(config, parallel)
        self.layers = nn.ModuleList(
            self.layer_class(config, layer, ops, parallel) for layer in parallel.layers(config.layers)
        )
        if parallel.last_stage:
            self.norm = RMSNorm(config.hidden, config.rms_eps, ops)
            shared = config.tie_word_embeddings and self.embedding is not None
            self.head = self.embedding if shared else Vocabulary(config, parallel)
        self.cos_sin = cos_sin_table(config.rope, config.head_dim, config.max_context)

    @property
    def kv_heads(self) -> int:
        """KV heads of this rank, the width of its KV pool."""
        return kv_head_share(self.config, self.parallel)[1]

    def place(self, device: torch.device | str) -> None:
        """Give the parameters memory on ``device``, unfilled, and move the rotary table there."""
        self.to_empty(device=device)
        self.cos_sin = self.cos_sin.to(device)

    def forward(self, batch: ForwardBatch, kv: KVPool, hidden: Tensor | None = None) -> Tensor:
        """[n, hidden] after this stage's layers, and after the final norm on the last stage.

        ``hidden``: what the stage before returned, None on the first; it may be overwritten. ``kv.keys[i]`` belongs to
        this stage's i-th layer. A batch of decodes alone is computed without waiting for the device.
        """
        if self.parallel.first_stage:
            x = self.embed(batch.input_ids)
        elif hidden is not None:
            x = hidden
        else:
            raise ValueError(f"stage {self.parallel.stage} needs the hidden states of the stage before it")
        residual: Tensor | None = None
        for layer, keys, values in zip(self.layers, kv.keys, kv.values, strict=True):
            x, residual = layer(x, residual, batch, keys, values, self.cos_sin)
        if self.parallel.last_stage:
            return self.norm(x) if residual is None else self.norm.add(x, residual)[0]
        return x if residual is None else x + residual

    def embed(self, ids: Tensor) -> Tensor:
        """int64[n] -> [n, hidden], what the first layer gets. On the first stage alone."""
        assert self.embedding is not None
        return self.embedding.embed(ids)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[m, hidden] of the last stage -> [m, vocab] of its dtype, the same on every rank; written to ``out`` if given.

        Raises ValueError on another stage.
        """
        if self.head is None:
            raise ValueError(f"stage {self.parallel.stage} of {self.parallel.pp} has no output projection")
        return self.head.logits(hidden, out)

    def sources(self) -> Iterator[AnySource]:
        """Every checkpoint tensor that this rank and stage reads, and where it goes."""
        if self.embedding is not None:
            yield from self.embedding.sources("model.embed_tokens")
        for layer, number in zip(self.layers, self.parallel.layers(self.config.layers), strict=True):
            assert isinstance(layer, DecoderLayer)
            yield from layer.sources(f"model.layers.{number}")
        if self.parallel.last_stage:
            yield from self.norm.sources("model.norm")
            if self.head is not None and self.head is not self.embedding:
                yield from self.head.sources("model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")

    def canonical(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint's tensor under the names of :meth:`sources`: stacked experts come apart, one by one.

        transformers 5 can hold all experts of a layer in one tensor, with gate and up stacked.
        """
        prefix, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                yield f"{prefix}.experts.{i}.gate_proj.weight", gate
                yield f"{prefix}.experts.{i}.up_proj.weight", up
        elif last == "down_proj":
            for i, expert in enumerate(tensor):
                yield f"{prefix}.experts.{i}.down_proj.weight", expert
        else:
            yield name, tensor

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, write: bool = True) -> None:
        """Fill the parameters from (name, whole tensor) pairs under Hugging Face names, in any order.

        A pair is let go before the next is asked for. Tensors of other pipeline stages are passed over. Raises
        BadCheckpoint naming what is missing, unexpected or of another shape.

        ``write=False`` only looks whether they would fill them; it reads the values of tied embeddings at most.
        """
        wanted = {source.name: source for source in self.sources()}
        missing = set(wanted)
        unexpected: list[str] = []
        tied_head: Tensor | None = None
        embedding: Tensor | None = None
        for raw_name, whole in tensors:
            for name, tensor in self.canonical(raw_name, whole):
                if self.config.fp8 is not None and self.config.fp8.saved:
                    if name.endswith(".input_scale"):
                        continue  # of activations, which stay as they are
                    if name.endswith(".weight_scale") and tensor.numel() == 1:
                        tensor = tensor.reshape(())
                source = wanted.get(name)
                if source is not None:
                    self._check_fp8(source, tensor)
                    if tuple(tensor.shape) != source.shape:
                        raise BadCheckpoint(
                            f"tensor {name} has shape {list(tensor.shape)}, expected {list(source.shape)}"
                        )
                    if write:
                        source.fill(tensor)
                    elif name == "model.embed_tokens.weight":
                        embedding = tensor
                    missing.discard(name)
                elif name == "lm_head.weight" and self.config.tie_word_embeddings:
                    tied_head = tensor
                elif not self._of_another_stage(name):
                    unexpected.append(name)
                del tensor
            del whole  # before the next one is made
        for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise BadCheckpoint(f"{what} tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}")
        if tied_head is not None and self.head is not None:
            self._check_tied(tied_head, embedding)

    @staticmethod
    def _check_fp8(source: AnySource, tensor: Tensor) -> None:
        saved = isinstance(source, Fp8Source) and source.fp8.saved
        if saved and tensor.dtype != FP8:
            raise BadCheckpoint(f"tensor {source.name} is {tensor.dtype}; quantization_config says FP8 (e4m3)")
        if not isinstance(source, Fp8Source) and tensor.dtype == FP8:
            raise BadCheckpoint(f"tensor {source.name} is FP8, without a quantization_config that says so")

    def _check_tied(self, tensor: Tensor, embedding: Tensor | None) -> None:
        """Some checkpoints keep a copy of the embedding as lm_head.weight; another tensor would mean untied weights.

        ``embedding``: the checkpoint's own, if it has not been put into its place.
        """
        assert self.head is not None
        (source,) = self.head.sources("lm_head")

        def share(whole: Tensor) -> Tensor:
            held = torch.empty_like(source.into)
            source._replace(into=held).fill(whole)
            return held

        if tuple(tensor.shape) != source.shape or not torch.equal(
            share(tensor), source.into if embedding is None else share(embedding)
        ):
            raise BadCheckpoint(
                "tensor lm_head.weight differs from model.embed_tokens.weight, yet tie_word_embeddings is true"
            )

    def _of_another_stage(self, name: str) -> bool:
        if name.endswith(".rotary_emb.inv_freq"):
            return True  # a constant that old checkpoints carry along
        if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            return self.parallel.pp > 1
        head, _, rest = name.partition("model.layers.")
        number = rest.partition(".")[0]
        if head or not number.isdigit() or int(number) >= self.config.layers:
            return False
        return int(number) not in self.parallel.layers(self.config.layers)
