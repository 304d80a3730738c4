"""The roofline cost model: an operator takes the longer of its arithmetic and its memory traffic, and an overhead.

With F FLOPs and B bytes these are ``F / (peak * efficiency)`` and ``B / (bandwidth * efficiency)`` (Williams, Waterman and
Patterson, "Roofline", 2009); how far the two overlap differs by operator. Weights are read once a step; activations are 2
bytes an element.
Decode steps depend on three numbers (padded batch, samples, context) and are a look-up and a multiplication.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from backends.capture_sizes import default_capture_sizes
from backends.checkpoint.layer_kinds import Dense, Experts, Latent, Mixer, Recurrent
from backends.checkpoint.precision import PARTS, Held, Precision, as_precision
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.communication import (
    ACTIVATION_BYTES,
    all_reduce_s,
    all_to_all_s,
    next_stage_s,
    norms_s,
)
from backends.simulated.cost.models.exchange import Exchange, ExchangeRule
from backends.simulated.cost.models.expert_loads import distinct_experts, imbalance
from backends.simulated.cost.models.group_tokens import group_tokens
from backends.simulated.cost.models.layer_times import AttentionTimes, times_of
from workbench.scheduler.batch import ModelWorkerBatch

T = TypeVar("T", bound=Hashable)

OVERLAP = 3
"""Power in which arithmetic and traffic of a matrix product add up: 1 would be one after the other, infinity all at once."""
ELEMENTWISE_PASSES = 10
"""Reads and writes of a hidden-size vector per token and layer outside the matrices: norms, residuals, rotary."""
MOST_EXCHANGES = 10_000
"""Exchanges whose seconds are kept: with several ranks there are more combinations of tokens than memory for them."""


class RooflineCost:
    """Roofline times of a model on a GPU under TP, PP and EP.

    ``capture_sizes`` pads decode batches to captured graphs; empty runs them at their own size.
    """

    def __init__(
        self,
        model: ModelSpec,
        gpu: GPU,
        *,
        dtype: str | Precision = "bf16",
        kv_dtype: str = "bf16",
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        capture_sizes: Sequence[int] | None = None,
        mixed_capture_sizes: Sequence[int] = (),
        exchange: Exchange | None = None,
        expert_skew: float = 0.0,
    ) -> None:
        self.model, self.gpu = model, gpu
        self.tp, self.pp, self.ep = tp, pp, ep
        self._capture = list(default_capture_sizes() if capture_sizes is None else capture_sizes)
        self._mixed_capture = list(mixed_capture_sizes)
        self.expert_skew = expert_skew
        self.exchange = exchange or Exchange("all-to-all", ExchangeRule(), gpu, tp)
        weights = as_precision(dtype)
        self.notes: list[str] = []
        if not gpu.fp4_flops and any(how.computes == "fp4" for part in PARTS for _, how in weights.of(part)):
            self.notes.append(f"{gpu.name} has no units for products in fp4: they are counted in 16 bits")
        self.parts = {part: _Matrices(gpu, weights.of(part)) for part in PARTS}
        self.plain = _Matrices(gpu, [(1.0, weights.plain)])
        self._bandwidth = gpu.memory_bandwidth * gpu.memory_efficiency
        self._stages = [RooflineStage(self, stage, kv_dtype) for stage in range(pp)]

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time of one stage."""
        decodes = self.decodes(batch, 1, stage) if not batch.num_prefill else None
        return decodes[0] if decodes is not None else sum(self.explain(batch, stage).values())

    def decodes(self, batch: ModelWorkerBatch, steps: int, stage: int = 0) -> list[float] | None:
        """Seconds of a decode batch and of those that follow it while the same requests decode, ``steps`` in all. None where
        what a layer reads is not known from the sum of the contexts: with windows, and where tokens are chosen."""
        at, requests, tokens = self._stages[stage], batch.decode_tokens, batch.context_tokens
        if not at.linear_in_context:
            return None
        fixed, context_s = self._fixed(at, requests), at.context_s
        return [fixed + context_s * context for context in range(tokens, tokens + steps * requests, requests)]

    def _fixed(self, at: RooflineStage, requests: int) -> float:
        """Seconds of a decode step, but for the contexts that attention reads."""
        fixed = at.fixed.get(requests)
        if fixed is None:
            tokens = self._padded(requests)
            fixed = at.fixed[requests] = sum(at.linear(tokens, tokens).values()) + at.attention_fixed_s(requests)
        return fixed

    def explain(self, batch: ModelWorkerBatch, stage: int = 0) -> dict[str, float]:
        """Seconds by group of operators; they add up to :meth:`forward`."""
        at = self._stages[stage]
        tokens = batch.prefill_tokens + batch.decode_tokens
        samples = batch.num_samples
        if not batch.num_prefill:
            tokens = samples = self._padded(tokens)
        parts = dict(at.linear(tokens, samples))
        parts["attention"] = at.attention_s(batch)
        return parts

    def sampling_s(self, batch: ModelWorkerBatch) -> float:
        """Seconds of :meth:`forward` on the last stage that are the sampler's."""
        return self.explain(batch, self.pp - 1).get("sampler", 0.0)

    def group_forward(self, batches: Sequence[ModelWorkerBatch | None]) -> float:
        """Seconds of a step that data-parallel ranks take together because they share their experts; None is a rank with
        nothing to run, which takes part with one token. Every layer waits for the slowest rank."""
        at = self._stages[0]
        tokens = group_tokens(batches, self._capture, self._mixed_capture, self.exchange.rule.pads)
        own = 0.0
        for batch, count in zip(batches, tokens, strict=True):
            samples = 0 if batch is None else batch.num_samples if batch.num_prefill else count
            parts = dict(at.linear(count, samples))
            parts["attention"] = 0.0 if batch is None else at.attention_s(batch)
            own = max(own, sum(seconds for part, seconds in parts.items() if part not in ("experts", "all_to_all")))
        prompts = any(batch is not None and batch.num_prefill for batch in batches)
        return own + at.all_experts_s(sum(tokens)) + at.exchange_s(tokens, prompts)

    def stage(self, stage: int) -> RooflineStage:
        """One stage's operators, for models that borrow the roofline's shape."""
        return self._stages[stage]

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send hidden states (and residuals) to the next stage."""
        tokens = batch.prefill_tokens + batch.decode_tokens
        return next_stage_s(tokens, self.model.hidden, self.tp, self.gpu, stage)

    def _padded(self, requests: int) -> int:
        at = bisect.bisect_left(self._capture, requests)
        return self._capture[at] if at < len(self._capture) else requests

    def matrix_s(
        self, held: _Matrices, tokens: float, parameters: float, width: float, depth: float, products: int = 1
    ) -> float:
        """Matrix products: ``tokens`` rows, weights of ``parameters`` in ``depth`` rows, ``width`` elements in and out a
        row, all together."""
        arithmetic_s = 2 * tokens * parameters * held.flop_s
        traffic_s = parameters * held.weight_s + tokens * width * held.activation_s
        together_s: float = (arithmetic_s**OVERLAP + traffic_s**OVERLAP) ** (1 / OVERLAP)
        return together_s + products * held.overhead_s + depth * held.depth_s

    def mlp_s(self, part: str, tokens: float, width: int, gated: bool) -> float:
        """An MLP of an inner ``width`` that every token passes through; ``part`` of the model says how it is held."""
        matrices, hidden = 3 if gated else 2, self.model.hidden
        parameters, elements = matrices * hidden * width / self.tp, 2 * hidden + matrices * width / self.tp
        return self.matrix_s(self.parts[part], tokens, parameters, elements, hidden + width / self.tp, products=2)

    def traffic_s(self, traffic_bytes: float, kernels: int = 1) -> float:
        """Operators that only move memory."""
        return traffic_bytes / self._bandwidth + kernels * self.gpu.kernel_overhead_s


class _Matrices:
    """The matrix products of a part of the model, and their rates, in the mean of the ways in which it is held."""

    def __init__(self, gpu: GPU, held: Sequence[tuple[float, Held]]) -> None:
        """``held``: the share of the part's matrices that is held in each way."""
        self.flop_s = self.weight_s = self.activation_s = 0.0
        """Seconds a FLOP, a weight that is read, and an element that goes in or out."""
        self.overhead_s = self.depth_s = 0.0
        """Seconds a product, and a row of its weights."""
        self.expert_flop_s = self.expert_weight_s = self.expert_activation_s = 0.0
        """The same of the grouped products of routed experts."""
        self.expert_overhead_s = self.expert_depth_s = self.expert_each_s = 0.0
        """Seconds of a layer's, of a row of an expert's weights, and of an expert that has tokens."""
        for share, how in held:
            rates = gpu.product_rates(how.computes, how.bytes)
            self.flop_s += share / rates.flops
            self.weight_s += share * how.bytes / rates.bandwidth
            self.activation_s += share * ACTIVATION_BYTES / rates.bandwidth
            self.overhead_s += share * rates.overhead_s
            self.depth_s += share * rates.depth_s
            self.expert_flop_s += share / rates.expert_flops
            self.expert_weight_s += share * how.bytes / rates.expert_bandwidth
            self.expert_activation_s += share * ACTIVATION_BYTES / rates.expert_activation_bandwidth
            self.expert_overhead_s += share * rates.expert_overhead_s
            self.expert_depth_s += share * rates.expert_depth_s
            self.expert_each_s += share * rates.expert_each_s


class RooflineStage:
    """One stage's layers, with everything that does not depend on the batch worked out."""

    def __init__(self, cost: RooflineCost, stage: int, kv_dtype: str) -> None:
        model, tp, gpu = cost.model, cost.tp, cost.gpu
        self._cost = cost
        self._layers = model.stage_stack(cost.pp, stage)
        self._first, self._last = stage == 0, stage == cost.pp - 1
        self.fixed: dict[int, float] = {}
        self._linear: dict[tuple[int, int], dict[str, float]] = {}
        self._exchanges: dict[tuple[int, ...], float] = {}
        self._kinds = _counted(layer.mixer for layer in self._layers if layer.mixer is not None)
        times = {mixer: times_of(mixer, kv_dtype, tp, gpu) for mixer in self._kinds}
        self._mixers = [(times[mixer], layers) for mixer, layers in self._kinds.items()]
        """Kinds of attention and recurrence, with how many layers have each."""
        self.linear_in_context = all(kind.linear for kind, _ in self._mixers)
        self._projections = _counted(
            _projection(layer.mixer, model.hidden, tp) for layer in self._layers if layer.mixer
        )
        self._mlps = _counted(layer.mlp for layer in self._layers if isinstance(layer.mlp, Dense))
        self._experts = _counted(layer.mlp for layer in self._layers if isinstance(layer.mlp, Experts))
        self._halves = _counted(
            (times[layer.mixer].written_bytes if layer.mixer else 0.0, bool(layer.mixer) + bool(layer.mlp))
            for layer in self._layers
        )
        """Layers by what a token leaves in memory, and whether they are a mixer, an MLP, or both."""
        self._attention = next((kind for kind, _ in self._mixers if isinstance(kind, AttentionTimes)), None)
        self.context_s = sum(kind.context_s * layers for kind, layers in self._mixers)
        """Seconds for each token of context that decodes read, where that is all that counts."""
        self.attention_overhead_s = sum(kind.overhead_s * layers for kind, layers in self._mixers)
        self.prompt_overhead_s = sum(kind.prompt_overhead_s * layers for kind, layers in self._mixers)

    def layer_decodes_s(self, requests: float, context: float) -> float:
        """Attention of one layer's decodes that each see ``context`` tokens, without what starts and ends it."""
        if self._attention is None:
            return 0.0
        return requests * (context * self._attention.context_s + self._attention.steps_s(1))

    def attention_fixed_s(self, requests: int) -> float:
        """Seconds of a decode step's attention and recurrences, but for the contexts that are read."""
        return self.attention_overhead_s + sum(kind.steps_s(requests) * layers for kind, layers in self._mixers)

    def linear(self, tokens: int, samples: int) -> dict[str, float]:
        """Everything but attention, for ``tokens`` computed and ``samples`` of them sampled."""
        key = (tokens, samples)
        parts = self._linear.get(key)
        if parts is None:
            parts = self._linear[key] = self._work_out(tokens, samples)
        return parts

    def _work_out(self, tokens: int, samples: int) -> dict[str, float]:
        cost, model, gpu, tp, ep = self._cost, self._cost.model, self._cost.gpu, self._cost.tp, self._cost.ep
        hidden = model.hidden
        parts = {
            "projections": sum(
                count * cost.matrix_s(cost.parts[part], tokens, parameters, width, depth, products)
                for (part, parameters, width, depth, products), count in self._projections.items()
            )
        }
        if self._mlps:
            parts["mlp"] = sum(
                count * cost.mlp_s("mlp", tokens, mlp.width, mlp.gated) for mlp, count in self._mlps.items()
            )
        if self._experts:
            parts["experts"] = self.all_experts_s(tokens)
        elementwise = ELEMENTWISE_PASSES * tokens * hidden * ACTIVATION_BYTES
        parts["elementwise"] = sum(
            count * cost.traffic_s(elementwise * halves / 2 + tokens * written, kernels=2 * halves)
            for (written, halves), count in self._halves.items()
        )
        message = tokens * hidden * ACTIVATION_BYTES
        dense, moe = sum(self._mlps.values()), sum(self._experts.values())
        added_up = dense + moe if ep == 1 or (ep == tp and cost.exchange.reduces_inside) else dense
        parts["all_reduce"] = (sum(self._projections.values()) + added_up) * all_reduce_s(message, tp, gpu)
        parts["all_reduce"] += sum(
            count * norms_s(mixer, tokens, tp, gpu, lambda norm_bytes: all_reduce_s(norm_bytes, tp, gpu))
            for mixer, count in self._kinds.items()
        )
        if moe and ep > 1 and added_up == dense:
            parts["all_to_all"] = self.exchange_s([tokens], samples < tokens)
        if self._first:
            parts["embedding"] = cost.traffic_s(2 * message)
        if self._last and samples:
            held = cost.plain if model.tied_embeddings else cost.parts["head"]
            parts["lm_head"] = cost.matrix_s(held, samples, hidden * model.vocab / tp, 0, hidden)
            # Logits in fp32: written, scaled, and read for the choice.
            parts["sampler"] = cost.traffic_s(3 * 4 * samples * model.vocab / tp, kernels=4)
            if tp > 1:
                parts["all_reduce"] += all_to_all_s(4 * samples * model.vocab / tp, tp, gpu)
        return parts

    def exchange_s(self, tokens: Sequence[int], prompts: bool) -> float:
        """Sending the ``tokens`` of each rank to experts on other GPUs, and the results back, of all layers. ``prompts``:
        whether any of the ranks has some."""
        exchange, hidden = self._cost.exchange, self._cost.model.hidden
        key = (*tokens, prompts)
        seconds = self._exchanges.get(key)
        if seconds is None:
            if len(self._exchanges) >= MOST_EXCHANGES:
                self._exchanges.clear()
            found = (count * exchange.seconds(each, hidden, tokens, prompts) for each, count in self._experts.items())
            seconds = self._exchanges[key] = sum(found)
        return seconds

    def all_experts_s(self, tokens: int) -> float:
        """The experts of all layers."""
        return sum(count * self.experts_s(tokens, each) for each, count in self._experts.items())

    def experts_s(self, tokens: int, experts: Experts | None = None) -> float:
        """Router, the experts that ``tokens`` draws touch, and shared experts, of one layer, on the most loaded rank.
        ``experts`` are the model's first where none are named."""
        cost, model = self._cost, self._cost.model
        experts = experts or model.routed
        assert experts is not None
        per_token, held, hidden = experts.per_token, cost.parts["experts"], model.hidden
        touched = distinct_experts(experts.count, per_token, tokens, cost.expert_skew)
        most = imbalance(experts.count, per_token, tokens, cost.expert_skew, cost.ep)
        ranks = max(cost.tp, cost.ep)
        parameters, gate = experts.expert(hidden) / ranks, 3 if experts.gated else 2
        # A rank has the draws of its experts under EP, and its part of the width of all under TP.
        draws, width = most * tokens * per_token / cost.ep, experts.width * cost.ep / ranks
        depth = experts.latent or hidden
        seconds = (
            2 * tokens * per_token * parameters * most * held.expert_flop_s
            + touched * parameters * held.expert_weight_s
            + draws * (2 * depth + gate * width) * held.expert_activation_s
            + held.expert_overhead_s
            + (depth + width) * held.expert_depth_s
            + touched / cost.ep * held.expert_each_s
        )
        seconds += cost.matrix_s(cost.plain, tokens, experts.router(hidden), hidden + experts.count, hidden)
        if shared := experts.shared(hidden) / cost.tp:
            inner = (experts.shared_width + experts.dense_width) / cost.tp
            width = 2 * hidden + gate * inner
            seconds += cost.matrix_s(cost.parts["shared_experts"], tokens, shared, width, hidden + inner, products=2)
        return seconds

    def prefill_attention_s(self, pairs: float, tokens: float, read_tokens: float) -> float:
        """Attention of one layer's prompts of ``tokens``: ``pairs`` of query and key, over ``read_tokens`` of KV."""
        return self._attention.pairs_s(pairs, tokens, read_tokens) if self._attention is not None else 0.0

    def attention_s(self, batch: ModelWorkerBatch) -> float:
        """Attention and recurrences of all layers: prefill rows causally over their prefix, decode rows over their
        context."""
        count, lens = batch.num_prefill, batch.seq_lens
        total = self.prompt_overhead_s if count else self.attention_overhead_s
        seen = 0.0
        if batch.decode_tokens:
            seen = batch.context_tokens - (float(sum(lens[:count].tolist())) if count else 0.0)
        for kind, layers in self._mixers:
            seconds = 0.0
            if count:
                seconds += kind.prompts_s(batch.query_lens[:count], lens[:count])
            if batch.decode_tokens:
                seconds += kind.decodes_s(lens[count:], seen)
            total += layers * seconds
        return total


def _projection(mixer: Mixer, hidden: int, tp: int) -> tuple[str, float, float, float, int]:
    """What the products around a mixer depend on: the part they are of, their parameters, the elements in and out of a row,
    the rows of their weights, all together, and how many they are."""
    parameters = mixer.held_elements(hidden, tp)
    if isinstance(mixer, Latent):
        # Down to the latents, up to queries, into and out of latents by head, and out.
        inner, query, rank = mixer.heads * mixer.v_head_dim / tp, mixer.q_lora_rank or 0, mixer.kv_lora_rank
        width = 2 * hidden + 2 * query + mixer.latent + 2 * (mixer.heads / tp) * (mixer.latent + rank) + inner
        depth = hidden + query + mixer.qk_nope_head_dim + rank + inner
        return mixer.part, parameters, width, depth, 5 if query else 4
    if isinstance(mixer, Recurrent):
        inner = mixer.inner / tp
        return mixer.part, parameters, 2 * hidden + mixer.projected / tp, hidden + inner, 2
    # QKV in, O out.
    inner = mixer.heads * mixer.value_dim / tp
    width = 2 * hidden + inner + (parameters - inner * hidden) / hidden
    return mixer.part, parameters, width, hidden + inner, 2


def _counted(each: Iterable[T]) -> dict[T, int]:
    """How often each occurs, in the order in which they first do."""
    return dict(Counter(each))
