"""The roofline cost model: every operator takes the longer of its arithmetic and its memory traffic.

For an operator with F FLOPs and B bytes: ``max(F / (peak * efficiency), B / (bandwidth * efficiency)) + kernel overhead``
(Williams, Waterman and Patterson, "Roofline", 2009). Weights are read once a step; activations are 2 bytes an element.
Decode steps depend on three numbers (padded batch, samples, context) and are a look-up and a multiplication.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from backends.capture_sizes import default_capture_sizes
from backends.checkpoint.precision import PARTS, Held, Precision, as_precision
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import DTYPE_BYTES, ModelSpec
from backends.simulated.cost.models.communication import ACTIVATION_BYTES, all_reduce_s, all_to_all_s, next_stage_s
from workbench.scheduler.batch import ModelWorkerBatch

GEMM_TILE_ROWS = 64
"""Tensor-core kernels compute whole tiles: token counts round up to this for arithmetic, not for traffic."""
ELEMENTWISE_PASSES = 10
"""Reads and writes of a hidden-size vector per token and layer outside the matrices: norms, residuals, rotary."""
EXPERT_TILE_ROWS = 64
"""Tile rows of the grouped products of experts, each of which has few rows."""


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
    ) -> None:
        self.model, self.gpu = model, gpu
        self.tp, self.pp, self.ep = tp, pp, ep
        self._capture = list(default_capture_sizes() if capture_sizes is None else capture_sizes)
        weights = as_precision(dtype)
        self.notes = list(weights.notes)
        if (together := max(tp, ep)) > gpu.gpus_per_node:
            self.notes.append(
                f"{together} GPUs of {gpu.name} work together and a node has {gpu.gpus_per_node}: links between nodes are"
                " taken for links in one"
            )
        self.parts = {part: _Matrices(gpu, weights.of(part)) for part in PARTS}
        self.plain = _Matrices(gpu, [(1.0, weights.plain)])
        self._attention_flops = gpu.bf16_flops * gpu.attention_efficiency
        self._kv_bandwidth = gpu.memory_bandwidth * gpu.kv_efficiency
        self._bandwidth = gpu.memory_bandwidth * gpu.memory_efficiency
        self._stages = [_Stage(self, stage, kv_dtype) for stage in range(pp)]

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time of one stage."""
        decodes = self.decodes(batch, 1, stage) if not batch.num_prefill else None
        return decodes[0] if decodes is not None else sum(self.explain(batch, stage).values())

    def decodes(self, batch: ModelWorkerBatch, steps: int, stage: int = 0) -> list[float] | None:
        """Seconds of a decode batch and of those that follow it while the same requests decode, ``steps`` in all. None where
        attention has a window: what it reads is not known from the sum of the contexts."""
        at, requests, tokens = self._stages[stage], batch.decode_tokens, batch.context_tokens
        if not at.full_attention_only:
            return None
        fixed, context_s = self._fixed(at, requests), at.context_s
        return [fixed + context_s * context for context in range(tokens, tokens + steps * requests, requests)]

    def _fixed(self, at: _Stage, requests: int) -> float:
        """Seconds of a decode step, but for the contexts that attention reads."""
        fixed = at.fixed.get(requests)
        if fixed is None:
            tokens = self._padded(requests)
            fixed = at.fixed[requests] = sum(at.linear(tokens, tokens).values()) + at.attention_overhead_s
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
        own, tokens = 0.0, 0
        for batch in batches:
            if batch is None:
                parts = dict(at.linear(self._padded(1), 0))
                count = 1
            else:
                parts = self.explain(batch)
                count = batch.prefill_tokens + batch.decode_tokens
            exchange_s = parts.pop("all_to_all", 0.0)
            parts.pop("experts", None)
            own = max(own, sum(parts.values()) + exchange_s)
            tokens += self._padded(count)
        moe = sum(self.model.moe_layers)
        return own + moe * at.experts_s(tokens)

    def stage(self, stage: int) -> _Stage:
        """One stage's operators, for models that borrow the roofline's shape."""
        return self._stages[stage]

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send hidden states (and residuals) to the next stage."""
        tokens = batch.prefill_tokens + batch.decode_tokens
        return next_stage_s(tokens, self.model.hidden, self.tp, self.gpu)

    def _padded(self, requests: int) -> int:
        at = bisect.bisect_left(self._capture, requests)
        return self._capture[at] if at < len(self._capture) else requests

    def matrix_s(self, held: _Matrices, tokens: float, parameters: float, width: float, products: int = 1) -> float:
        """Matrix products: ``tokens`` rows, weights of ``parameters``, ``width`` elements in and out a row, all together."""
        rows = math.ceil(tokens / GEMM_TILE_ROWS) * GEMM_TILE_ROWS
        traffic = parameters * held.bytes + tokens * width * ACTIVATION_BYTES
        return max(2 * rows * parameters * held.flop_s, traffic / self._bandwidth) + products * held.overhead_s

    def traffic_s(self, traffic_bytes: float, kernels: int = 1) -> float:
        """Operators that only move memory."""
        return traffic_bytes / self._bandwidth + kernels * self.gpu.kernel_overhead_s


class _Matrices:
    """The matrix products of a part of the model, and their rates."""

    def __init__(self, gpu: GPU, held: Sequence[tuple[float, Held]]) -> None:
        """``held``: the share of the part's matrices that is held in each way."""
        self.bytes = sum(share * how.bytes for share, how in held)
        self.flop_s = self.expert_flop_s = 0.0
        """Seconds a FLOP, of large products and of the grouped ones of routed experts."""
        self.overhead_s = gpu.product_overhead_s
        for share, how in held:
            peak = gpu.flops_for(how.computes)
            eight_bits = peak > gpu.bf16_flops
            self.flop_s += share / (peak * (gpu.fp8_efficiency if eight_bits else gpu.compute_efficiency))
            self.expert_flop_s += share / (peak * gpu.expert_efficiency)
            # Such products need their activations in eight bits, too: a kernel more.
            self.overhead_s += share * eight_bits * gpu.kernel_overhead_s


class _Stage:
    """One stage's layers, with everything that does not depend on the batch worked out."""

    def __init__(self, cost: RooflineCost, stage: int, kv_dtype: str) -> None:
        model, tp = cost.model, cost.tp
        self._cost = cost
        self._layers = list(model.stage_layers(cost.pp, stage))
        self._moe = sum(model.moe_layers[layer] for layer in self._layers)
        self._first, self._last = stage == 0, stage == cost.pp - 1
        self.fixed: dict[int, float] = {}
        self._linear: dict[tuple[int, int], dict[str, float]] = {}
        windows: dict[int | None, int] = {}
        for layer in self._layers:
            windows[model.windows[layer]] = windows.get(model.windows[layer], 0) + 1
        self._windows = windows
        """Layers by attention window."""
        self.full_attention_only = set(windows) <= {None}
        kv_bytes = DTYPE_BYTES[kv_dtype]
        heads = max(model.heads / tp, 1)
        if model.mla is not None:
            latent = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
            self._kv_layer_bytes = latent * kv_bytes
            # Absorbed decode: scores against the latent and rotary parts, values out of the latent (DeepSeek-V2, 2.1).
            self._decode_pair_flops = 2 * heads * (latent + model.mla.kv_lora_rank)
            qk = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
            self._prefill_pair_flops = 2 * heads * (qk + model.mla.v_head_dim)
        else:
            self._kv_layer_bytes = 2 * max(model.kv_heads / tp, 1) * model.head_dim * kv_bytes
            self._decode_pair_flops = self._prefill_pair_flops = 4 * heads * model.head_dim
        per_context_s = max(self._kv_layer_bytes / cost._kv_bandwidth, self._decode_pair_flops / cost._attention_flops)
        self.layer_context_s = per_context_s
        """Seconds a layer for each token of context that a decode reads."""
        self.context_s = per_context_s * len(self._layers)
        self.attention_overhead_s = cost.gpu.attention_overhead_s * len(self._layers)

    def linear(self, tokens: int, samples: int) -> dict[str, float]:
        """Everything but attention, for ``tokens`` computed and ``samples`` of them sampled."""
        key = (tokens, samples)
        parts = self._linear.get(key)
        if parts is None:
            parts = self._linear[key] = self._work_out(tokens, samples)
        return parts

    def _work_out(self, tokens: int, samples: int) -> dict[str, float]:
        cost, model, gpu, tp, ep = self._cost, self._cost.model, self._cost.gpu, self._cost.tp, self._cost.ep
        count = len(self._layers)
        moe, dense = self._moe, count - self._moe
        hidden = model.hidden
        # Two products around attention (QKV in, O out) share its parameters.
        projections = model.attention_parameters() / tp
        parts = {
            "projections": count * cost.matrix_s(cost.parts["attention"], tokens, projections, 4 * hidden, products=2)
        }
        if dense:
            gate = 3 if model.gated_mlp else 2
            parameters = gate * hidden * model.intermediate / tp
            width = 2 * hidden + gate * model.intermediate / tp
            parts["mlp"] = dense * cost.matrix_s(cost.parts["mlp"], tokens, parameters, width, products=2)
        if moe:
            parts["experts"] = moe * self.experts_s(tokens)
        kv_write = tokens * self._kv_layer_bytes
        elementwise = ELEMENTWISE_PASSES * tokens * hidden * ACTIVATION_BYTES
        parts["elementwise"] = count * cost.traffic_s(elementwise + kv_write, kernels=4)
        message = tokens * hidden * ACTIVATION_BYTES
        reduced = count + (dense if ep > 1 else count)
        parts["all_reduce"] = reduced * all_reduce_s(message, tp, gpu)
        if moe and ep > 1:
            sent = tokens * model.experts_per_token * hidden * ACTIVATION_BYTES / ep
            parts["all_to_all"] = moe * 2 * all_to_all_s(sent, ep, gpu)
        if self._first:
            parts["embedding"] = cost.traffic_s(2 * message)
        if self._last and samples:
            held = cost.plain if model.tied_embeddings else cost.parts["head"]
            parts["lm_head"] = cost.matrix_s(held, samples, hidden * model.vocab / tp, 0)
            # Logits in fp32: written, scaled, and read for the choice.
            parts["sampler"] = cost.traffic_s(3 * 4 * samples * model.vocab / tp, kernels=4)
            if tp > 1:
                parts["all_reduce"] += all_to_all_s(4 * samples * model.vocab / tp, tp, gpu)
        return parts

    def experts_s(self, tokens: int) -> float:
        """Router, the experts that ``tokens`` draws touch, and shared experts; load is taken as even over ranks."""
        cost, model, gpu = self._cost, self._cost.model, self._cost.gpu
        per_token, held = model.experts_per_token, cost.parts["experts"]
        # Expected distinct experts when every token picks `per_token` of them at random.
        touched = model.experts * (1 - (1 - per_token / model.experts) ** tokens)
        ranks = max(cost.tp, cost.ep)
        parameters = model.expert_parameters() / ranks
        traffic = touched * parameters * held.bytes
        traffic += tokens * per_token * (2 * model.hidden + 3 * model.expert_intermediate) / ranks * ACTIVATION_BYTES
        # Each touched expert computes whole tiles of its own few rows.
        rows = touched * math.ceil(tokens * per_token / max(touched, 1) / EXPERT_TILE_ROWS) * EXPERT_TILE_ROWS
        flops_s = 2 * rows * parameters * held.expert_flop_s
        router = cost.matrix_s(cost.plain, tokens, model.hidden * model.experts, model.hidden + model.experts)
        seconds = max(flops_s, traffic / cost._bandwidth) + gpu.expert_overhead_s + router
        if model.shared_expert_intermediate:
            shared = 3 * model.hidden * model.shared_expert_intermediate / cost.tp
            width = 2 * model.hidden + 3 * model.shared_expert_intermediate / cost.tp
            seconds += cost.matrix_s(cost.parts["shared_experts"], tokens, shared, width)
        return seconds

    def prefill_attention_s(self, pairs: float, read_tokens: float) -> float:
        """Attention of one layer's prompts: ``pairs`` of query and key, over ``read_tokens`` of KV."""
        flops_s = self._prefill_pair_flops * pairs / self._cost._attention_flops
        return max(flops_s, read_tokens * self._kv_layer_bytes / self._cost._kv_bandwidth)

    def attention_s(self, batch: ModelWorkerBatch) -> float:
        """Attention of all layers: prefill rows causally over their prefix, decode rows over their context."""
        total = self.attention_overhead_s
        count = batch.num_prefill
        for window, layers in self._windows.items():
            seconds = 0.0
            if count:
                new = batch.query_lens[:count]
                context = batch.seq_lens[:count]
                if window is None:
                    # Whole numbers, so exact; and prefills are few: numpy would take longer.
                    lens = list(zip(new.tolist(), context.tolist(), strict=True))
                    pairs = float(sum(n * (end - n) + n * (n + 1) // 2 for n, end in lens))
                    read = float(sum(end for _, end in lens))
                else:
                    # Position p sees min(p + 1, window) tokens.
                    pairs = float((_triangle(context, window) - _triangle(context - new, window)).sum())
                    read = float((new + (context - new).clip(max=window)).sum())
                seconds += self.prefill_attention_s(pairs, read)
            if batch.decode_tokens:
                if window is None:
                    seen = batch.context_tokens - (float(sum(batch.seq_lens[:count].tolist())) if count else 0.0)
                else:
                    seen = float(batch.seq_lens[count:].clip(max=window).sum())
                seconds += seen * self.layer_context_s
            total += layers * seconds
        return total


def _triangle(length, window: int):  # type: ignore[no-untyped-def]
    """Sum over positions p < length of min(p + 1, window), elementwise."""
    head = length.clip(max=window)
    return head * (head + 1) / 2 + (length - head) * window
