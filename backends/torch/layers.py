"""The layers that models are made of, each holding this rank's share of its weights.

A layer knows three things: how to compute (through the operator set it was given), where its weights come from
(:meth:`sources`: which rows or columns of which checkpoint tensors fill which rows of its parameters), and when the
ranks of a tensor-parallel group have to talk. Heads, inner dimensions and the vocabulary are split; norms and routers
are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from backends.torch import fp8
from backends.torch.forward_batch import ForwardBatch
from backends.torch.fp8 import Fp8
from backends.torch.model_config import ModelConfig, UnsupportedModel
from backends.torch.parallel import Parallel


class Source(NamedTuple):
    """One tensor of a checkpoint and the part of a parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    """Of the checkpoint's tensor, whole."""
    into: Tensor
    """A view of the parameter, of the share's shape."""
    dim: int = 0
    start: int = 0
    """The share is ``into.shape[dim]`` elements along ``dim``, from ``start``."""

    def fill(self, tensor: Tensor) -> None:
        """Copy this rank's share of a checkpoint tensor of :attr:`shape`, changing dtype and device on the way."""
        self.into.copy_(tensor.narrow(self.dim, self.start, self.into.shape[self.dim]))


class Fp8Source(NamedTuple):
    """A weight of a checkpoint and the part of an FP8 parameter and of its scales that it fills."""

    name: str
    shape: tuple[int, ...]
    into: Tensor
    """e4m3, a view of the parameter."""
    scales: Tensor
    """float32[rows, blocks across], a view."""
    fp8: Fp8
    dim: int = 0
    start: int = 0

    def fill(self, tensor: Tensor) -> None:
        """Copy this rank's share of a weight, quantised first unless it was saved so (its scales come by themselves)."""
        if tensor.dtype != fp8.DTYPE:
            tensor, scales = fp8.quantise(tensor.to(self.into.device), self.fp8)
            self.fill_scales(scales)
        self.into.copy_(tensor.narrow(self.dim, self.start, self.into.shape[self.dim]))

    def fill_scales(self, scales: Tensor) -> None:
        """Copy this rank's share of the scales of the whole weight."""
        rows = fp8.row_scales(scales, self.shape[0], self.fp8)
        if self.dim == 0:
            rows = rows.narrow(0, self.start, len(self.scales))
        elif self.fp8.block is not None:
            rows = rows.narrow(1, self.start // self.fp8.block[1], self.scales.shape[1])
        self.scales.copy_(rows)


class ScaleSource(NamedTuple):
    """The scales of a checkpoint's FP8 weight."""

    name: str
    shape: tuple[int, ...]
    of: Fp8Source

    @property
    def into(self) -> Tensor:
        """Tensor that they go to."""
        return self.of.scales

    def fill(self, tensor: Tensor) -> None:
        """Copy this rank's share."""
        self.of.fill_scales(tensor.to(self.of.scales.device))


AnySource = Source | Fp8Source | ScaleSource


class Part(NamedTuple):
    """A checkpoint tensor of ``rows`` rows, of which a rank takes ``share`` from ``start``."""

    name: str
    rows: int
    start: int
    share: int


def even_share(total: int, parallel: Parallel, what: str, config: ModelConfig) -> tuple[int, int]:
    """(start, count) of this rank's share. Raises UnsupportedModel when the split is not even."""
    if total % parallel.tp:
        raise UnsupportedModel(f"{config.source}: {total} {what} cannot be split over {parallel.tp} GPUs (tp)")
    count = total // parallel.tp
    return parallel.tp_rank * count, count


def kv_head_share(config: ModelConfig, parallel: Parallel) -> tuple[int, int]:
    """(first KV head, how many) of this rank. With fewer heads than ranks, neighbours hold the same head.

    Raises UnsupportedModel when neither number divides the other.
    """
    heads, tp = config.kv_heads, parallel.tp
    if heads >= tp:
        return even_share(heads, parallel, "KV heads", config)
    if tp % heads:
        raise UnsupportedModel(f"{config.source}: {heads} KV heads cannot be shared by {tp} GPUs (tp)")
    return parallel.tp_rank * heads // tp, 1


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float, ops: ModuleType) -> None:
        super().__init__()
        self.weight, self.eps, self.ops = _empty(size), eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), both [n, size]; the arguments may be overwritten."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the norm in the checkpoint."""
        yield Source(f"{name}.weight", tuple(self.weight.shape), self.weight)


class Weight(nn.Module):
    """A matrix, in the model's dtype or in FP8 with scales: float32[outputs, blocks across], a row's own in each."""

    def __init__(self, outputs: int, share: int, inputs: int, ops: ModuleType, quantised: Fp8 | None) -> None:
        """``share`` of all ``inputs`` are this rank's."""
        super().__init__()
        self.inputs, self.ops, self.quantised = inputs, ops, quantised
        self.scales: Tensor | None = None
        if quantised is None:
            self.values = _empty(outputs, share)
        else:
            self.values = nn.Parameter(torch.empty(outputs, share, dtype=fp8.DTYPE), requires_grad=False)
            self.scale_columns = quantised.of(outputs, share)[1]
            across = -(-share // self.scale_columns)
            self.scales = nn.Parameter(torch.empty(outputs, across, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[n, share] -> [n, outputs]."""
        if self.scales is None:
            return functional.linear(x, self.values, bias)
        out: Tensor = self.ops.fp8_linear(x, self.values, self.scales, self.scale_columns)
        return out if bias is None else out + bias

    def sources(self, name: str, rows: int, into: slice, dim: int, start: int) -> Iterator[AnySource]:
        """The checkpoint's projection ``name`` of ``rows`` outputs, whose share from ``start`` along ``dim`` fills the rows
        ``into``."""
        shape = rows, self.inputs
        if self.quantised is None or self.scales is None:
            yield Source(f"{name}.weight", shape, self.values[into], dim, start)
            return
        weight = Fp8Source(f"{name}.weight", shape, self.values[into], self.scales[into], self.quantised, dim, start)
        yield weight
        if self.quantised.saved:
            # Published names: block scales are called inverse (of what was multiplied by), but are multiplied with.
            block = self.quantised.block is not None
            scales = fp8.scale_shape(shape, self.quantised) if block else ()
            yield ScaleSource(f"{name}.weight_scale_inv" if block else f"{name}.weight_scale", scales, weight)


class ColumnLinear(nn.Module):
    """Projections of one input, stacked into a single product; each rank computes its share of every one's outputs."""

    def __init__(
        self, inputs: int, parts: list[Part], ops: ModuleType, bias: bool = False, quantised: Fp8 | None = None
    ) -> None:
        super().__init__()
        self.parts = parts
        outputs = sum(part.share for part in parts)
        self.weight = Weight(outputs, inputs, inputs, ops, quantised)
        self.bias = _empty(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, this rank's outputs], one part after another."""
        return self.weight(x, self.bias)

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: what comes before the parts' own names in the checkpoint."""
        at = 0
        for part in self.parts:
            rows = slice(at, at + part.share)
            yield from self.weight.sources(f"{name}.{part.name}", part.rows, rows, 0, part.start)
            if self.bias is not None:
                yield Source(f"{name}.{part.name}.bias", (part.rows,), self.bias[rows], 0, part.start)
            at += part.share


class RowLinear(nn.Module):
    """A projection whose inputs are split: each rank's product is a summand of the result."""

    def __init__(
        self,
        inputs: int,
        share: tuple[int, int],
        outputs: int,
        ops: ModuleType,
        parallel: Parallel,
        bias: bool = False,
        quantised: Fp8 | None = None,
    ) -> None:
        """Hold a share of a projection. Raises UnsupportedModel where its border cuts through a block of FP8 scales."""
        super().__init__()
        self.start, self.outputs, self.parallel = share[0], outputs, parallel
        if quantised is not None and quantised.block is not None and parallel.tp > 1 and share[1] % quantised.block[1]:
            raise UnsupportedModel(
                f"FP8 blocks of {quantised.block[1]} columns cannot be split into shares of {share[1]} (tp {parallel.tp})"
            )
        self.weight = Weight(outputs, share[1], inputs, ops, quantised)
        self.bias = _empty(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, this rank's inputs] -> [n, outputs], summed over the ranks."""
        if self.parallel.tp == 1:
            return self.weight(x, self.bias)
        out = self.parallel.all_reduce(self.weight(x, None))
        return out if self.bias is None else out + self.bias

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the projection in the checkpoint."""
        yield from self.weight.sources(name, self.outputs, slice(None), 1, self.start)
        if self.bias is not None:
            yield Source(f"{name}.bias", (self.outputs,), self.bias)


class Vocabulary(nn.Module):
    """One row a token, split over the ranks: the embedding, the output projection, or both at once when they are tied.

    A vocabulary that does not divide evenly is padded at its end. Rows of the padding are never filled, looked up or
    returned.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.vocab, self.parallel = config.vocab, parallel
        self.rows = -(-config.vocab // parallel.tp)
        self.start = parallel.tp_rank * self.rows
        self.weight = _empty(self.rows, config.hidden)

    def embed(self, ids: Tensor) -> Tensor:
        """int64[n] -> [n, hidden]."""
        if self.parallel.tp == 1:
            return functional.embedding(ids, self.weight)
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(found.masked_fill(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[m, hidden] -> [m, vocab] in the model's dtype, the same on every rank; written to ``out`` if given."""
        if self.parallel.tp == 1:
            return torch.mm(hidden, self.weight.t(), out=out)
        full = self.parallel.all_gather(functional.linear(hidden, self.weight))[:, : self.vocab]
        return full.contiguous() if out is None else out.copy_(full)

    def sources(self, name: str) -> Iterator[Source]:
        """``name``: of the embedding or the output projection in the checkpoint."""
        filled = max(0, min(self.rows, self.vocab - self.start))
        shape = (self.vocab, self.weight.shape[1])
        yield Source(f"{name}.weight", shape, self.weight[:filled], 0, min(self.start, self.vocab))


class Attention(nn.Module):
    """Grouped-query attention over the paged KV pool."""

    def __init__(self, config: ModelConfig, layer: int, ops: ModuleType, parallel: Parallel) -> None:
        super().__init__()
        self.ops, self.head_dim, self.window = ops, config.head_dim, config.windows[layer]
        self.scale = config.head_dim**-0.5
        size = config.head_dim
        first, self.heads = even_share(config.heads, parallel, "attention heads", config)
        first_kv, self.kv_heads = kv_head_share(config, parallel)
        kv = (config.kv_heads * size, first_kv * size, self.kv_heads * size)
        parts = [
            Part("q_proj", config.heads * size, first * size, self.heads * size),
            Part("k_proj", *kv),
            Part("v_proj", *kv),
        ]
        self.qkv = ColumnLinear(config.hidden, parts, ops, config.qkv_bias, config.fp8)
        self.out = RowLinear(
            config.heads * size,
            (first * size, self.heads * size),
            config.hidden,
            ops,
            parallel,
            config.o_bias,
            config.fp8,
        )
        self.q_norm = RMSNorm(size, config.rms_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_eps, ops) if config.qk_norm else None
        self.eps = config.rms_eps

    def forward(self, x: Tensor, batch: ForwardBatch, keys: Tensor, values: Tensor, cos_sin: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden]; stores the tokens' keys and values in this layer's pool first."""
        qkv = self.qkv(x).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        norms = (None, None) if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight)
        q = self.ops.attention_inputs(q, k, v, *norms, self.eps, batch.positions, cos_sin, keys, values, batch.slots)
        return self.out(self.attend(q, batch, keys, values).reshape(len(x), -1))

    def attend(self, q: Tensor, batch: ForwardBatch, keys: Tensor, values: Tensor) -> Tensor:
        """[n, h, d] -> [n, h, d]: prompts and decodes each by the operator made for them."""
        tokens, requests = batch.prefill_tokens, batch.num_prefill
        parts = []
        if tokens:
            parts.append(
                self.ops.prefill_attention(
                    q[:tokens],
                    keys,
                    values,
                    batch.page_table,
                    batch.rows[:requests],
                    batch.q_starts,
                    batch.seq_lens[:requests],
                    max_extend=batch.max_extend,
                    page_size=batch.page_size,
                    scale=self.scale,
                    window=self.window,
                )
            )
        if tokens < len(q):
            parts.append(
                self.ops.decode_attention(
                    q[tokens:],
                    keys,
                    values,
                    batch.page_table,
                    batch.rows[requests:],
                    batch.seq_lens[requests:],
                    page_size=batch.page_size,
                    scale=self.scale,
                    window=self.window,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the attention module in the checkpoint."""
        yield from self.qkv.sources(name)
        yield from self.out.sources(f"{name}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.sources(f"{name}.q_norm")
            yield from self.k_norm.sources(f"{name}.k_norm")


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, ops: ModuleType, parallel: Parallel) -> None:
        super().__init__()
        self.ops = ops
        size = config.intermediate
        share = even_share(size, parallel, "elements of intermediate_size", config)
        parts = [Part("gate_proj", size, *share), Part("up_proj", size, *share)]
        self.gate_up = ColumnLinear(config.hidden, parts, ops, config.mlp_bias, config.fp8)
        self.down = RowLinear(size, share, config.hidden, ops, parallel, config.mlp_bias, config.fp8)

    def forward(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        return self.down(self.ops.silu_and_mul(self.gate_up(x)))

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the MLP in the checkpoint."""
        yield from self.gate_up.sources(name)
        yield from self.down.sources(f"{name}.down_proj")


class Mixture(nn.Module):
    """A router and gated experts. Every rank holds a slice of each expert's inner dimension."""

    def __init__(
        self,
        config: ModelConfig,
        ops: ModuleType,
        parallel: Parallel,
        projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        """``projections``: what the checkpoint calls an expert's three."""
        super().__init__()
        self.ops, self.parallel, self.projections = ops, parallel, projections
        self.top_k, self.renormalize = config.top_k, config.renormalize
        self.size, hidden = config.expert_intermediate, config.hidden
        self.start, self.count = even_share(self.size, parallel, "elements of an expert's inner size", config)
        self.gate = _empty(config.experts, hidden)
        self.gate_up = _empty(config.experts, 2 * self.count, hidden)
        self.down = _empty(config.experts, hidden, self.count)

    def forward(self, x: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        router_logits = functional.linear(x, self.gate)
        out = self.ops.moe(x, router_logits, self.gate_up, self.down, top_k=self.top_k, renormalize=self.renormalize)
        return self.parallel.all_reduce(out)

    def sources(self, name: str) -> Iterator[AnySource]:
        """``name``: of the mixture in the checkpoint."""
        experts, hidden = self.gate.shape
        yield Source(f"{name}.gate.weight", (experts, hidden), self.gate)
        gate, up, down = self.projections
        for i in range(experts):
            expert = f"{name}.experts.{i}"
            first, second = self.gate_up[i].split(self.count)
            yield Source(f"{expert}.{gate}.weight", (self.size, hidden), first, 0, self.start)
            yield Source(f"{expert}.{up}.weight", (self.size, hidden), second, 0, self.start)
            yield Source(f"{expert}.{down}.weight", (hidden, self.size), self.down[i], 1, self.start)
