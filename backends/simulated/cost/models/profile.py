"""The profile cost model: a step's time as the sum of its operators' measured times.

    step = layers * (dense operators(tokens) + attention(prompt, cached, decodes, context) + experts(tokens, distinct
    experts))
         + once a step(tokens) + head(sequences) + communication(bytes, ranks)

Token counts are those the GPU computes: a step that replays a captured graph is padded to the graph's size. Several
prompts in one step are attended as one prompt of their total length whose cached prefix gives the same number of
query-key pairs.

Outside the measured range a time is the one at the range's edge times what the roofline says the ratio of the two is,
and :attr:`ProfileCost.notes` says so once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from backends.checkpoint.layer_kinds import Layer
from backends.checkpoint.precision import Precision
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.communication import ACTIVATION_BYTES, all_reduce_s, next_stage_s, norms_s
from backends.simulated.cost.models.exchange import Exchange, ExchangeRule
from backends.simulated.cost.models.expert_loads import distinct_experts, imbalance
from backends.simulated.cost.models.group_tokens import group_tokens
from backends.simulated.cost.models.operator_tables import Curve, Grid, OperatorTables
from backends.simulated.cost.models.roofline import MOST_EXCHANGES, RooflineCost, RooflineStage
from backends.simulated.cost.models.sequence_splits import cut_at, first_uncut
from workbench.scheduler.batch import ModelWorkerBatch

DENSE_ONLY = ("gate_up_proj", "act_fn", "down_proj")
"""Operators that a layer with experts does not have."""
FIRST_ONLY = ("embedding",)
"""Once-a-step operators of the first pipeline stage; the others are the last one's."""
_BESIDE_A_PROMPT = ("decodes beside a prompt", "context tokens of a decode")
"""Names of the last two axes of a table of attention with prompts."""


class ProfileCost:
    """Measured times of a model on a GPU.

    ``capture_sizes`` are the batches for which decode graphs were captured, ``mixed_capture_sizes`` the token counts
    for which the parts between attention were; empty runs them at their own size. ``ep`` is over how many GPUs the
    experts are spread. ``step_s`` is what every step runs on the GPU beside the model (staging copies, gathering the
    last tokens), ``request_s`` what it runs for each request in it: no table has these.
    """

    def __init__(
        self,
        tables: OperatorTables,
        model: ModelSpec,
        gpu: GPU,
        *,
        dtype: str | Precision = "bf16",
        kv_dtype: str = "bf16",
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        capture_sizes: Sequence[int] = (),
        mixed_capture_sizes: Sequence[int] = (),
        step_s: float = 0.0,
        request_s: float = 0.0,
        exchange: Exchange | None = None,
        expert_skew: float = 0.0,
    ) -> None:
        self.tables, self.model, self.gpu = tables, model, gpu
        self.tp, self.ep = tp, ep
        self._expert_parts = max(tp, ep) / tables.experts_over
        self._capture, self._mixed_capture = list(capture_sizes), list(mixed_capture_sizes)
        self._expert_skew = expert_skew
        self.exchange = exchange or Exchange("allgather-reducescatter", ExchangeRule(), gpu, tp)
        self.exchange.gather, self.exchange.scatter = tables.gather, tables.scatter
        self._attention = tables.attention
        splits = tables.provenance.engine.startswith("vLLM") and gpu.multiprocessors  # whose kernel follows that rule
        if self._attention is not None and splits:
            first = first_uncut(gpu.multiprocessors, max(model.kv_heads / tp, 1), self._capture)
            self._attention = cut_at(self._attention, first)
        self._step_s, self._request_s = step_s, request_s
        self._gaps_s = tables.kernels_per_layer * gpu.kernel_overhead_s
        self._graph_gaps_s = tables.kernels_per_layer * gpu.graph_gap_s
        self._shape = RooflineCost(model, gpu, dtype=dtype, kv_dtype=kv_dtype, tp=tp, pp=pp, capture_sizes=[]).stage(0)

        def roofline(layers: Iterable[Layer]) -> RooflineStage:
            """What the roofline says of these layers alone."""
            some = replace(model, stack=tuple(layers))
            return RooflineCost(some, gpu, dtype=dtype, kv_dtype=kv_dtype, tp=tp, ep=ep, capture_sizes=[]).stage(0)

        self._stages = [_Stage(tables, model, pp, stage, roofline) for stage in range(pp)]
        self.notes: list[str] = list(tables.notes)
        """Sentences about where times are from, and about look-ups outside the measured range, each once."""
        self._noted: set[str] = set()
        self._reduce_each: dict[float, float] = {}
        self._exchanges: dict[tuple[int, ...], float] = {}
        self._uneven_parts: dict[tuple[int, int], Grid] = {}
        for kind in tables.mixers.values():
            kind.tell(partial(self._note, how="in proportion"))

    @property
    def layers_timed(self) -> bool:
        """Whether the tables are of whole layers as they ran."""
        return self.tables.layers_timed

    @property
    def collectives_measured(self) -> bool:
        """Whether every collective between its GPUs was measured, so that no link is assumed."""
        tables = self.tables
        exchanged = self.ep <= self.tp or (tables.gather is not None and tables.scatter is not None)
        return len(self._stages) == 1 and (self.tp == 1 or tables.all_reduce is not None) and exchanged

    # -- a step ------------------------------------------------------------------------------------------------------

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time of one stage for a batch."""
        at = self._stages[stage]
        tokens = self._computed(batch)
        seconds = self.beside_s(batch, stage) + self.linear_s(tokens, stage) + self._all_attention_s(batch, at)
        if at.last:
            seconds += self.head_s(len(batch.rows))
        if self.tp > 1:
            seconds += self.reduce_s(tokens, stage)
        if at.moe:
            seconds += self._all_experts_s(tokens, at)
        return seconds

    def explain(self, batch: ModelWorkerBatch, stage: int = 0) -> dict[str, float]:
        """Seconds by operator; they add up to :meth:`forward`."""
        at = self._stages[stage]
        tokens, sequences = self._computed(batch), len(batch.rows)
        scale = self.linear_s(tokens, stage) / at.linear.at(tokens)
        parts = {name: curve.at(tokens) * scale for name, curve in at.parts.items()}
        if at.last:
            scale = self.head_s(sequences) / self._stages[-1].head.at(sequences)
            parts |= {name: curve.at(sequences) * scale for name, curve in self.tables.head.items()}
        parts["attention"] = self._all_attention_s(batch, at)
        parts["beside the operators"] = self.beside_s(batch, stage)
        if self.tp > 1:
            parts["all_reduce"] = self.reduce_s(tokens, stage)
        if at.moe:
            parts["experts"] = self._all_experts_s(tokens, at)
        return parts

    def sampling_s(self, batch: ModelWorkerBatch) -> float:
        """Seconds of :meth:`forward` on the last stage that are the sampler's, where the profile tells it from the head."""
        return self.explain(batch, len(self._stages) - 1).get("sampler", 0.0)

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send hidden states and residuals to the next stage."""
        tokens = batch.prefill_tokens + batch.decode_tokens
        return next_stage_s(tokens, self.model.hidden, self.tp, self.gpu, stage)

    def group_forward(self, batches: Sequence[ModelWorkerBatch | None]) -> float:
        """Seconds of a step that data-parallel ranks take together because they share their experts; None is a rank
        with nothing to run, which takes part with one token.

        Every layer waits for the slowest rank before its experts, which then see the tokens of all.
        """
        at = self._stages[0]
        own, tokens = 0.0, group_tokens(batches, self._capture, self._mixed_capture, self.exchange.rule.pads)
        prompts = any(batch is not None and batch.num_prefill for batch in batches)
        for batch, count in zip(batches, tokens, strict=True):
            seconds = self.linear_s(count)
            if batch is None:
                seconds += at.attended * self.attention_of(0, 0.0, 1, 1.0, 1.0) if at.attended else 0.0
                seconds += sum(layers * kind.decodes_s(np.ones(1), 1.0) for kind, layers in at.mixers)
                seconds += at.rest.attention_fixed_s(1) if at.rest is not None else 0.0
            else:
                seconds += self._all_attention_s(batch, at)
                seconds += self.head_s(len(batch.rows))
            if self.tp > 1:
                seconds += self.reduce_s(count, but=at.moe)
            own = max(own, seconds)
        whole = max(self.beside_s(batch) for batch in batches if batch is not None)
        return whole + own + self._all_experts_s(sum(tokens), at) + at.moe * self.exchange_s(tokens, prompts)

    # -- its parts ---------------------------------------------------------------------------------------------------

    def beside_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Compute what a step takes on the GPU beside its operators.

        That is staging, and the time between kernels, which is shorter where a graph replays them.
        """
        sizes = self._mixed_capture if batch.num_prefill else self._capture
        graph = bool(sizes) and batch.prefill_tokens + batch.decode_tokens <= sizes[-1]
        staged = self._step_s + self._request_s * len(batch.rows)
        return staged + self._stages[stage].layers * (self._graph_gaps_s if graph else self._gaps_s)

    def linear_s(self, tokens: int, stage: int = 0) -> float:
        """Everything of a stage but attention, experts and head."""
        curve = self._stages[stage].linear
        most = curve.most
        if tokens <= most:
            return curve.table[tokens]
        self._note("tokens a step", tokens, most)
        return (
            curve.table[most] * sum(self._shape.linear(tokens, 0).values()) / sum(self._shape.linear(most, 0).values())
        )

    def head_s(self, sequences: int) -> float:
        """Output head and sampler."""
        curve = self._stages[-1].head
        if sequences <= curve.most:
            return curve.table[sequences]
        self._note("sequences a step", sequences, curve.most)
        return curve.table[curve.most] * sequences / curve.most

    def _all_attention_s(self, batch: ModelWorkerBatch, at: _Stage) -> float:
        """Attention of a stage, and what its layers have in place of it."""
        seconds = at.attended * self.attention_s(batch) if at.attended else 0.0
        if at.mixers:
            count, lens, decodes = batch.num_prefill, batch.seq_lens, batch.decode_tokens
            seen = float(batch.context_tokens - (lens[:count].sum() if count else 0))
            for kind, layers in at.mixers:
                if count:
                    seconds += layers * kind.prompts_s(batch.query_lens[:count], lens[:count])
                if decodes:
                    seconds += layers * kind.decodes_s(lens[count:] if count else lens, seen)
        return seconds if at.rest is None else seconds + at.rest.attention_s(batch)

    def attention_s(self, batch: ModelWorkerBatch) -> float:
        """Attention of one layer, of those that were measured."""
        prompts, decodes = batch.num_prefill, batch.decode_tokens
        context, lens = batch.context_tokens, batch.seq_lens
        if not prompts:
            return self.attention_of(0, 0.0, decodes, context / decodes, float(lens.max()))
        chunk = batch.prefill_tokens
        new = batch.query_lens[:prompts]
        pairs = 0.0
        for length, count in zip(lens[:prompts].tolist(), new.tolist(), strict=True):
            pairs += count * (length - count / 2)  # query-key pairs of a prompt: new * (cached + new / 2)
            context -= length
        cached = pairs / chunk - chunk / 2
        if not decodes:
            return self.attention_of(chunk, cached, 0, 0.0, 0.0)
        return self.attention_of(chunk, cached, decodes, context / decodes, float(lens[prompts:].max()))

    def attention_of(self, chunk: int, cached: float, decodes: int, mean: float, longest: float) -> float:
        """Attention of one layer: ``chunk`` prompt tokens after ``cached`` ones, beside ``decodes`` at ``mean`` context
        tokens, the longest of them at ``longest``. ``cached`` is negative for several short prompts in place of one."""
        attention = self._attention
        assert attention is not None
        unevenness = 1 - mean / longest if decodes > 1 else 0.0
        if not chunk:
            grid = attention.decode
            seconds = grid.at(decodes, mean)
            if decodes > grid.ends[0] or mean > grid.ends[1]:
                seconds *= self._beyond(("decodes", "context tokens of a decode"), grid.ends, (decodes, mean))
            if unevenness > 0 and attention.uneven_decode is not None:
                seconds *= 1 + attention.uneven_decode.at(decodes, unevenness, mean)
            return seconds
        if attention.by_keys:
            seconds = self._by_keys_s(attention.mixed, chunk, cached, decodes, mean)
        else:
            seconds = self._by_prefix_s(attention.mixed, chunk, cached, decodes, mean)
        if unevenness > 0 and attention.uneven is not None:
            seconds *= 1 + self._uneven_beside(attention.uneven, chunk, cached).at(decodes, unevenness, mean)
        return seconds

    def _by_keys_s(self, grid: Grid, chunk: int, cached: float, decodes: int, mean: float) -> float:
        """Attention with prompts, from a table by the keys that a prompt token sees."""
        where = (chunk, cached + chunk / 2, decodes, mean)
        seconds = grid.at(*where)
        ends = grid.ends
        if chunk > ends[0] or where[1] > ends[1] or decodes > ends[2] or mean > ends[3]:
            names = ("prompt tokens a step", "keys that a prompt token sees", *_BESIDE_A_PROMPT)
            edge = [min(value, end) for value, end in zip(where, ends, strict=True)]
            self._note_beyond(names, ends, where)
            seconds *= self._roofline_attention_s(chunk, cached, decodes, mean) / self._roofline_attention_s(
                edge[0], edge[1] - edge[0] / 2, edge[2], edge[3]
            )
        return seconds

    def _by_prefix_s(self, grid: Grid, chunk: int, cached: float, decodes: int, mean: float) -> float:
        """Attention with prompts, from a table by the cached tokens of one prompt."""
        ends = grid.ends
        if cached < 0 and chunk > ends[0]:
            # Several prompts, more than were measured at once: so many times fewer of them, each as long as these are.
            self._note_beyond(("prompt tokens a step",), ends, (chunk,))
            each = chunk + 2 * cached
            fewer = self._by_prefix_s(grid, int(ends[0]), (each - ends[0]) / 2, 0, 0.0) * chunk / ends[0]
            return fewer + (self.attention_of(0, 0.0, decodes, mean, mean) if decodes else 0.0)
        seconds = grid.at(chunk, cached, decodes, mean)
        if cached < 0:
            # Fewer pairs than one prompt of this length has: go back along the line of growing prefixes.
            further = grid.at(chunk, -cached, decodes, mean)
            seconds = max(2 * seconds - further, grid.at(grid.axes[0][0], 0, decodes, mean))
        where = (chunk, cached, decodes, mean)
        if chunk > ends[0] or cached > ends[1] or decodes > ends[2] or mean > ends[3]:
            names = ("prompt tokens a step", "cached tokens of a prompt", *_BESIDE_A_PROMPT)
            seconds *= self._beyond(names, ends, where)
        return seconds

    def _all_experts_s(self, tokens: int, at: _Stage) -> float:
        """The experts of a stage, for the ``tokens`` of all ranks that share them."""
        return at.moe * self.experts_s(tokens) if at.experts is None else at.experts.all_experts_s(tokens)

    def experts_s(self, tokens: int) -> float:
        """Routed experts of one layer on one GPU, for the ``tokens`` of all ranks that share them.

        A GPU with one of n parts of the experts computes 1/n of the rows, on as many of its experts as the tokens choose.
        Tensor parallelism divides every expert instead: the same arithmetic and the same weights to read.
        """
        grid, model = self.tables.experts, self.model
        assert grid is not None
        of = (model.experts, model.experts_per_token, tokens, self._expert_skew)
        rows, most = tokens / self._expert_parts * imbalance(*of, self.ep), grid.ends[0]
        seconds = grid.at(rows, distinct_experts(*of) / self._expert_parts)
        if rows > most:
            self._note("tokens of a GPU's experts", int(rows), int(most))
            seconds *= self._shape.experts_s(int(rows)) / self._shape.experts_s(int(most))
        return seconds

    def reduce_s(self, tokens: int, stage: int = 0, but: int = 0) -> float:
        """All-reduces of a stage over the tensor-parallel group: one for each mixer and MLP, and one for the embedding,
        ``but`` so many, and what norms over the heads of all GPUs take. (Gathering the logits is small beside them.)"""
        at = self._stages[stage]
        seconds = self._one_reduce_s(tokens) * (at.halves - but + (stage == 0))
        return seconds + sum(
            count * norms_s(mixer, tokens, self.tp, self.gpu, self._all_reduce_s) for mixer, count in at.kinds.items()
        )

    def _one_reduce_s(self, tokens: int) -> float:
        return self._all_reduce_s(tokens * self.model.hidden * ACTIVATION_BYTES)

    def _all_reduce_s(self, message_bytes: float) -> float:
        each = self._reduce_each.get(message_bytes)
        if each is None:
            measured = self.tables.all_reduce
            if measured is None:
                each = all_reduce_s(message_bytes, self.tp, self.gpu)
            else:
                each = measured.at(message_bytes) * max(message_bytes / measured.ends[0], 1.0)
            self._reduce_each[message_bytes] = each
        return each

    def exchange_s(self, tokens: Sequence[int], prompts: bool = False) -> float:
        """Sending a layer's tokens to experts of other ranks, and the results back; ``prompts``: whether any has some."""
        assert self.model.routed is not None
        key = (*tokens, prompts)
        seconds = self._exchanges.get(key)
        if seconds is None:
            if len(self._exchanges) >= MOST_EXCHANGES:
                self._exchanges.clear()
            seconds = self.exchange.seconds(self.model.routed, self.model.hidden, tokens, prompts)
            self._exchanges[key] = seconds
        return seconds

    def _uneven_beside(self, grid: Grid, chunk: int, cached: float) -> Grid:
        """Look up what uneven decodes cost beside the measured prompt nearest to this one.

        It changes slowly with the prompt's tokens and the cached ones before them.
        """
        key = (chunk >> 4, int(cached) >> 8)
        found = self._uneven_parts.get(key)
        if found is None:
            found = self._uneven_parts[key] = grid.near(chunk, cached)
        return found

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _computed(self, batch: ModelWorkerBatch) -> int:
        if batch.num_prefill:
            return self._pad(batch.prefill_tokens + batch.decode_tokens, self._mixed_capture)
        return self._pad(batch.decode_tokens, self._capture)

    @staticmethod
    def _pad(count: int, sizes: list[int]) -> int:
        if not sizes or count > sizes[-1]:
            return count
        return sizes[bisect_left(sizes, count)]

    def _beyond(self, names: Sequence[str], ends: Sequence[float], where: Sequence[float]) -> float:
        """Compute by how much attention grows from the edge of the measured range to ``where``.

        That is (decodes, mean context), and before them (prompt tokens, cached tokens) if there are prompts.
        """
        self._note_beyond(names, ends, where)
        edge = [min(value, end) for value, end in zip(where, ends, strict=True)]
        bare = [0.0] * (4 - len(where))
        return self._roofline_attention_s(*bare, *where) / self._roofline_attention_s(*bare, *edge)

    def _note_beyond(self, names: Sequence[str], ends: Sequence[float], where: Sequence[float]) -> None:
        for name, value, end in zip(names, where, ends):  # noqa: B905, the first axis alone may be of interest
            if value > end:
                self._note(name, int(value), int(end))

    def _roofline_attention_s(self, chunk: float, cached: float, decodes: float, mean: float) -> float:
        cached = max(cached, -chunk / 2)
        pairs = chunk * (cached + chunk / 2)
        prefill = self._shape.prefill_attention_s(pairs, chunk, chunk + cached) if chunk else 0.0
        return prefill + self._shape.layer_decodes_s(decodes, mean) + self.gpu.kernel_overhead_s

    def _note(self, what: str, value: int, most: int, how: str = "by the roofline's shape") -> None:
        if what not in self._noted:
            self._noted.add(what)
            self.notes.append(f"{what}: {value:,} is beyond the measured {most:,}; such steps are extrapolated {how}")


class _Stage:
    """One pipeline stage's layers, with the curves that do not depend on attention added up."""

    def __init__(
        self,
        tables: OperatorTables,
        model: ModelSpec,
        pp: int,
        stage: int,
        roofline: Callable[[Iterable[Layer]], RooflineStage],
    ) -> None:
        layers, stack = model.stage_layers(pp, stage), model.stage_stack(pp, stage)
        self.layers = len(layers)
        self.moe = sum(model.moe_layers[layer] for layer in layers)
        self.halves = sum((layer.mixer is not None) + (layer.mlp is not None) for layer in stack)
        """Mixers and MLPs."""
        self.last = stage == pp - 1
        mixers = [layer.mixer for layer in stack if layer.mixer is not None]
        self.kinds = Counter(mixers)
        rest = [mixer for mixer in mixers if tables.attention is None and mixer not in tables.mixers]
        self.attended = len(mixers) if tables.attention is not None else 0
        """Layers whose attention is all of one kind, and was measured."""
        self.mixers = [(tables.mixers[each], count) for each, count in self.kinds.items() if each in tables.mixers]
        """Kinds of attention and recurrence that were measured each for itself, with how many layers have it."""
        self.rest = roofline(Layer(mixer, None) for mixer in rest) if rest else None
        """The attention and recurrences of the others, by the roofline."""
        self.experts = roofline(stack) if self.moe and tables.experts is None else None
        """Experts that were not measured."""
        self.parts: dict[str, Curve] = {}
        for name, curve in tables.layer.items():
            count = self.layers - self.moe if name in DENSE_ONLY else self.layers
            if count:
                self.parts[name] = curve.times(count)
        for kind, count in Counter(stack if tables.kinds is not None else ()).items():
            for name, curve in (tables.kinds or {})[kind].items():
                curve = curve.times(count)
                self.parts[name] = self.parts[name] + curve if name in self.parts else curve
        for name, curve in tables.once.items():
            if stage == 0 if name in FIRST_ONLY else self.last:
                self.parts[name] = curve
        self.linear = _total(list(self.parts.values()))
        self.head = _total(list(tables.head.values()))


def _total(curves: list[Curve]) -> Curve:
    total = curves[0]
    for curve in curves[1:]:
        total = total + curve
    return total
