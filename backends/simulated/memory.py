"""How much KV fits: memory as a real runner finds it after loading and warming up."""

from __future__ import annotations

from dataclasses import dataclass

from backends.simulated.hardware import GPU
from backends.simulated.models import ModelSpec

RUNTIME_BYTES = 1.0 * 2**30
"""CUDA context, library workspaces and communication buffers: an estimate."""
GRAPH_BYTES_PER_LAYER = 12 * 2**20
"""Memory of captured decode graphs, an estimate in the range that engines print (some 0.4 GiB for 32 layers)."""
SMALLEST_USEFUL_TOKENS = 16


class ModelDoesNotFit(ValueError):
    """Weights and working memory leave no room for KV, in one line."""


@dataclass(frozen=True)
class MemoryBudget:
    """One GPU of the tightest stage, in bytes, and the KV tokens it leaves the instance."""

    usable_bytes: float
    weights_bytes: float
    activation_bytes: float
    graph_bytes: float
    runtime_bytes: float
    kv_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int


def kv_capacity(model: ModelSpec, gpu: GPU, *, dtype: str = "bf16", kv_dtype: str = "bf16", tp: int = 1, pp: int = 1,
                ep: int = 1, mem_fraction: float = 0.9, max_prefill_tokens: int = 8192,
                max_running: int = 256) -> MemoryBudget:  # fmt: skip
    """KV capacity: ``memory * mem_fraction`` less weights, peak activations, graphs and runtime, over the bytes of a
    token, for the stage with the least room.

    Raises :class:`ModelDoesNotFit` with what is needed, what there is, and the smallest tensor parallel size that fits.
    """
    budget = _tightest(model, gpu, dtype, kv_dtype, tp, pp, ep, mem_fraction, max_prefill_tokens, max_running)
    if budget.kv_tokens >= SMALLEST_USEFUL_TOKENS:
        return budget
    needed = budget.usable_bytes - budget.kv_bytes
    fits = "no tensor parallel size of one node fits"
    size = tp * 2
    while size <= gpu.gpus_per_node and model.heads % size == 0:
        wider = _tightest(
            model, gpu, dtype, kv_dtype, size, pp, min(ep, size), mem_fraction, max_prefill_tokens, max_running
        )
        if wider.kv_tokens >= SMALLEST_USEFUL_TOKENS:
            fits = f"it fits with tp {size}"
            break
        size *= 2
    raise ModelDoesNotFit(
        f"{model.name} in {dtype} does not fit {gpu.name} with tp {tp}, pp {pp}: needs {needed / 2**30:.1f} GiB before KV, "
        f"{budget.usable_bytes / 2**30:.1f} GiB usable a GPU; {fits}"
    )


def _tightest(model: ModelSpec, gpu: GPU, dtype: str, kv_dtype: str, tp: int, pp: int, ep: int, mem_fraction: float,
              max_prefill_tokens: int, max_running: int) -> MemoryBudget:  # fmt: skip
    budgets = []
    for stage in range(pp):
        usable = gpu.memory_bytes * mem_fraction
        weights = model.weight_bytes(dtype, tp, pp, ep, stage)
        # Live at the peak of a layer: a few hidden-size vectors a token, the gated MLP's two inner ones, and logits in fp32.
        inner = max(model.intermediate / tp, model.experts_per_token * model.expert_intermediate / tp)
        activations = max_prefill_tokens * (4 * model.hidden + 2 * inner) * 2 + max_running * model.vocab / tp * 4
        graphs = GRAPH_BYTES_PER_LAYER * len(model.stage_layers(pp, stage))
        per_token = model.kv_bytes_per_token(kv_dtype, tp, pp, stage)
        kv = usable - weights - activations - graphs - RUNTIME_BYTES
        tokens = max(int(kv // per_token), 0)
        budgets.append(MemoryBudget(usable, weights, activations, graphs, RUNTIME_BYTES, kv, per_token, tokens))
    return min(budgets, key=lambda budget: budget.kv_tokens)
