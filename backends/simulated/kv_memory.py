"""Room for KV: memory as a real runner finds it after loading and warming up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.checkpoint.layer_kinds import Dense, Layer, Recurrent
from backends.checkpoint.precision import DTYPE_BYTES, Precision, as_precision, named
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.kv_windows import ALL, KvRule, kv_room
from ground.errors import InputError

RUNTIME_BYTES = 1.0 * 2**30
"""CUDA context, library workspaces and communication buffers: an estimate."""
GRAPH_BYTES_PER_LAYER = 12 * 2**20
"""Memory of captured decode graphs, an estimate in the range that engines print (some 0.4 GiB for 32 layers)."""
SMALLEST_USEFUL_TOKENS = 16


class ModelDoesNotFit(InputError):
    """Weights and working memory leave no room for KV, in one line."""

    fits_running = 0
    """As many requests as may run at a time for their states, where that is what does not fit."""


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
    """Where every layer of attention keeps the token."""
    kv_tokens: int
    reserved_bytes: float = 0.0
    """Of ``kv_bytes``, for windows and states: beside the pool of tokens."""
    running: int = 0
    """How many requests may run at a time for their states."""


def kv_capacity(
    model: ModelSpec,
    gpu: GPU,
    *,
    dtype: str | Precision = "bf16",
    kv_dtype: str = "bf16",
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    mem_fraction: float = 0.9,
    max_prefill_tokens: int = 8192,
    max_running: int = 256,
    max_context: int | None = None,
    page_size: int = 1,
    rule: KvRule = ALL,
) -> MemoryBudget:
    """KV capacity: ``memory * mem_fraction`` less weights, peak activations, graphs and runtime, over the bytes of a
    token, for the stage with the least room; ``rule`` says what is reserved for windows and states.

    Raises :class:`ModelDoesNotFit` with what is needed, what there is, and what fits: the smallest tensor parallel size, or
    narrower weights, or fewer running requests.
    """
    weights = as_precision(dtype)

    def of_stages(weights: Precision, tp: int) -> list[MemoryBudget]:
        experts_over = min(ep, tp) if tp > first else ep
        return [of_stage(weights, tp, experts_over, stage) for stage in range(pp)]

    def tightest(stages: Sequence[MemoryBudget]) -> MemoryBudget:
        return min(stages, key=lambda each: each.kv_tokens)

    def of_stage(weights: Precision, tp: int, ep: int, stage: int) -> MemoryBudget:
        usable = gpu.memory_bytes * mem_fraction
        held = model.weight_bytes(weights, tp, pp, ep, stage)
        # Live at the peak of a layer: a few hidden-size vectors a token, the gated MLP's two inner ones, and logits in fp32.
        inner = max(map(_inner, model.stack)) / tp
        activations = max_prefill_tokens * (4 * model.hidden + 2 * inner) * 2 + max_running * model.vocab / tp * 4
        graphs = GRAPH_BYTES_PER_LAYER * len(model.stage_layers(pp, stage))
        kv = usable - held - activations - graphs - RUNTIME_BYTES
        room = kv_room(
            model,
            rule,
            kv,
            kv_dtype=kv_dtype,
            tp=tp,
            pp=pp,
            stage=stage,
            max_running=max_running,
            max_context=max_context or model.max_context,
            step_tokens=max_prefill_tokens,
            page_size=page_size,
        )
        per_token = model.kv_bytes_per_token(kv_dtype, tp, pp, stage)
        return MemoryBudget(
            usable,
            held,
            activations,
            graphs,
            RUNTIME_BYTES,
            kv,
            per_token,
            room.tokens,
            room.reserved_bytes,
            room.running,
        )

    def smallest(weights: Precision) -> int | None:
        """The smallest tensor parallel size that fits, from the one asked for on."""
        size = first
        while size == first or (size <= gpu.gpus_per_node and model.unsplit(size) is None):
            if tightest(of_stages(weights, size)).kv_tokens >= SMALLEST_USEFUL_TOKENS:
                return size
            size *= 2
        return None

    first = tp
    stages = of_stages(weights, tp)
    found = tightest(stages)
    # The stage with the least room for tokens need not be the one with the least for states.
    stage, fewest = min(enumerate(stages), key=lambda each: each[1].running)
    if fewest.running < max_running and min(each.kv_bytes for each in stages) > 0:
        problem = ModelDoesNotFit(
            f"{model.name} keeps a state of {model.state_bytes(tp, pp, stage) / 2**20:.1f} MiB a request on a GPU, and "
            f"{fewest.kv_bytes / 2**30:.1f} GiB are left for KV and states: not enough for max_running {max_running}; "
            + (f"--max-running {fewest.running} fits" if fewest.running else "a larger tp makes room")
        )
        problem.fits_running = fewest.running
        raise problem
    if found.kv_tokens >= SMALLEST_USEFUL_TOKENS:
        return found
    wider = smallest(weights)
    fits = f"it fits with tp {wider}" if wider else "no tensor parallel size of one node fits"
    narrower = [
        f"--dtype {name}" + (f" and tp {size}" if size > tp else "")
        for name in ("fp8", "int4")
        if DTYPE_BYTES[name] < weights.bytes_of(_heaviest(model)) and (size := smallest(named(name)))
    ]
    if narrower:
        fits += f"{',' if wider else ';'} {'or' if wider else 'it would'} with {', or with '.join(narrower)}"
    raise ModelDoesNotFit(
        f"{model.name} in {weights.dtype} does not fit {gpu.name} with tp {tp}, pp {pp}: needs "
        f"{(found.usable_bytes - found.kv_bytes) / 2**30:.1f} GiB before KV, {found.usable_bytes / 2**30:.1f} GiB usable a "
        f"GPU; {fits} ({weights.dtype} is from {weights.said_by})"
    )


def _inner(layer: Layer) -> float:
    """Width of the vectors within a layer, of which a token has two at a time."""
    mixer, mlp = layer.mixer, layer.mlp
    recurrence = mixer.projected / 2 if isinstance(mixer, Recurrent) else 0.0
    if mlp is None:
        return recurrence
    return max(mlp.width if isinstance(mlp, Dense) else mlp.per_token * mlp.width, recurrence)


def _heaviest(model: ModelSpec) -> str:
    return "experts" if any(model.moe_layers) else "mlp"
