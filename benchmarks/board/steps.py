"""Whole steps of models out of published operator tables, and what the cost models say of them.

A step is decodes of equal contexts, or one whole prompt, at sizes at which the attention of a model (and its experts) was
measured, on a GPU that it fits and whose tables have every other operator of its layers. Its truth is the sum of these, as
``--cost measured`` adds them up: products with weights between measured sizes, and all-reduces between measured
messages, are interpolated. Norms, activations, embedding, output head and sampler are left out on all sides.

A shape of an operator fits or scores (``halves.py``). A step scores where the rows of its attention and of its experts
do. It is predicted by ``--cost measured`` without any row that scores, and by the roofline, which is fitted to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.checkpoint.layer_kinds import Attention, Experts, Latent, Recurrent
from backends.checkpoint.precision import Held, Precision
from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, load_model
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.operator_tables import NotMeasured, OperatorTables, ProfileError
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables.measured_operators import ALWAYS, read_measured
from backends.simulated.cost.tables.published_package import ENGINES, PublishedTables, at_hand, find_tables
from benchmarks.board.halves import shape_scores
from benchmarks.board.predict import nearest_preset
from benchmarks.board.withheld import FittingHalf
from benchmarks.profile_lookup import batch
from workbench.scheduler.batch import ModelWorkerBatch

MODELS = {
    "meta-llama/Llama-3.1-8B": ("bf16", "fp8"),
    "meta-llama/Llama-3.1-70B": ("bf16", "fp8"),
    "Qwen/Qwen3-32B": ("bf16", "fp8"),
    "Qwen/Qwen3-14B": ("bf16",),
    "Qwen/Qwen3-0.6B": ("bf16",),
    "meta-llama/Llama-2-7b-hf": ("bf16", "fp8"),
    "codellama/CodeLlama-7b-hf": ("bf16",),
    "meta-llama/Llama-2-13b-hf": ("bf16",),
    "Qwen/Qwen3-30B-A3B": ("bf16", "fp8_block"),
    "Qwen/Qwen3-235B-A22B": ("bf16", "fp8_block"),
    "mistralai/Mixtral-8x7B-v0.1": ("bf16", "fp8"),
    "MiniMaxAI/MiniMax-M2.5": ("auto",),
    "deepseek-ai/DeepSeek-V3": ("auto",),
    "moonshotai/Kimi-K2-Instruct": ("auto",),
    "openai/gpt-oss-120b": ("auto",),
    "Qwen/Qwen3.5-27B": ("bf16",),
    "Qwen/Qwen3.5-397B-A17B": ("bf16", "fp8_block"),
}
"""What the weights of each are held in: ``--dtype``, or FP8 with a scale for every block of 128 by 128."""
BLOCKS = Precision("fp8", "blocks", Held(1 + 4 / 128**2, "fp8"), Held(2, "bf16"), {"head": 1.0})
TPS = (1, 2, 4, 8)
KV_DTYPE = "bf16"
MOST_DECODES = 512
CONTEXTS = (128, 65536)
"""Tokens of context of a decode, and of a prompt."""
NOT_COUNTED = {"elementwise", "embedding", "lm_head", "sampler", "beside the operators"}
"""Operators of both cost models that no table has or that are not of a layer."""


@dataclass(frozen=True)
class Case:
    """A model on a GPU."""

    gpu: str
    engine: str
    """A preset's name."""
    model: str
    dtype: str
    tp: int

    @property
    def described(self) -> str:
        """The case in words."""
        return f"{self.engine.partition('-')[0]}, {self.gpu}, {self.model}, tp {self.tp}, {self.dtype}"


@dataclass(frozen=True)
class Step:
    """One step, in seconds."""

    case: Case
    kind: str
    """Of the model."""
    requests: int
    context: int
    prompt: bool
    scores: bool
    truth_s: float
    measured_s: float
    """By ``--cost measured``, without the rows that score."""
    roofline_s: float

    @property
    def described(self) -> str:
        """The step in words."""
        what = f"a prompt of {self.context:,}" if self.prompt else f"{self.requests} decodes at {self.context:,}"
        return f"{self.case.described}, {what}"

    def error(self, of: str) -> float:
        """Signed error of ``measured`` or ``roofline``, as a share of the truth."""
        seconds: float = getattr(self, f"{of}_s")
        return seconds / self.truth_s - 1


def cases(gpus: Sequence[str] = ()) -> list[Case]:
    """Everything that there may be tables for, of these GPUs of the catalogue or of all."""
    return [
        Case(gpu, preset, model, dtype, tp)
        for gpu in gpus or gpu_names()
        for preset in (nearest_preset(engine, "") for engine in ENGINES)
        if preset and at_hand(gpu, preset)
        for model, dtypes in MODELS.items()
        for dtype in dtypes
        for tp in TPS
    ]


def steps_of(case: Case) -> list[Step] | str:
    """The steps of a case, or why there are none."""
    model, gpu = load_model(case.model), load_gpu(case.gpu)
    weights = BLOCKS if case.dtype == "fp8_block" else model.precision(case.dtype)
    want = CostRequest(model, gpu, weights, KV_DTYPE, case.tp, engine=case.engine)
    tables = find_tables(gpu, case.engine)
    if (why := model.unsplit(case.tp)) is not None:
        return f"tp {case.tp} does not divide its {why}"
    try:
        full = read_measured(want, tables)
        if lacking := [what for what in full.missing if what not in ALWAYS and what != "output head"]:
            return f"not measured: {lacking[0]}"
        sizes = list(_sizes(tables, model, case.tp))
        if not sizes:
            return "attention was measured at other sizes"
        part = read_measured(want, FittingHalf.of(tables))
    except ProfileError as error:
        return str(error)
    truth, measured = (_cost(each, want) for each in (full, part))
    roofline = RooflineCost(model, gpu, dtype=want.weights, kv_dtype=KV_DTYPE, tp=case.tp, capture_sizes=[])
    found = []
    room = gpu.memory_bytes - model.weight_bytes(weights, case.tp)
    for requests, context, prompt, scores in sizes:
        if requests * (context * model.kv_bytes_per_token(KV_DTYPE, case.tp) + model.state_bytes(case.tp)) > room:
            continue
        step = _batch(requests, context, prompt)
        seconds = [_counted(cost.explain(step)) for cost in (truth, measured, roofline)]
        found.append(Step(case, kind_of(model), requests, context, prompt, scores, *seconds))
    return found or "does not fit the GPU's memory"


def _cost(tables: OperatorTables, want: CostRequest) -> ProfileCost:
    return ProfileCost(tables, want.model, want.gpu, dtype=want.weights, kv_dtype=KV_DTYPE, tp=want.tp)


def _counted(parts: dict[str, float]) -> float:
    return sum(seconds for name, seconds in parts.items() if name not in NOT_COUNTED)


def _batch(requests: int, context: int, prompt: bool) -> ModelWorkerBatch:
    return batch(np.full(requests, context, np.int64), (context,) if prompt else ())


def kind_of(model: ModelSpec) -> str:
    """The kind of a model, by what its layers are made of."""
    mixers = {layer.mixer for layer in model.stack if layer.mixer is not None}
    grouped = any(isinstance(each, Attention) and each.heads > each.kv_heads for each in mixers)
    parts = {
        "latent attention": any(isinstance(each, Latent) for each in mixers),
        "linear attention": any(isinstance(each, Recurrent) for each in mixers),
        "windows": any(isinstance(each, Attention) and each.window is not None for each in mixers),
        "no grouped queries": not grouped and all(isinstance(each, Attention) for each in mixers),
    }
    return ", ".join(["experts" if model.routed else "dense", *(part for part, has in parts.items() if has)])


# -- sizes at which a model was measured ---------------------------------------------------------------------------------


def _sizes(tables: PublishedTables, model: ModelSpec, tp: int) -> Iterator[tuple[int, int, bool, bool]]:
    """Requests, context, whether it is a prompt, and whether the step scores."""
    experts = {layer.mlp for layer in model.stack if isinstance(layer.mlp, Experts)}
    for prompt in (False, True):
        of_attention = [
            _attention_sizes(tables, mixer, tp, prompt)
            for mixer in {layer.mixer for layer in model.stack if layer.mixer is not None}
        ]
        of_experts = [_experts_sizes(tables, each, model.hidden, tp) for each in experts]
        for (requests, context), halves in sorted(_in_all(of_attention).items()):
            tokens = context if prompt else requests
            if requests > MOST_DECODES or not CONTEXTS[0] <= context <= CONTEXTS[1]:
                continue
            if any(tokens not in each for each in of_experts):
                continue
            yield requests, context, prompt, all(halves) and all(each[tokens] for each in of_experts)


def _in_all(found: Sequence[dict[Any, bool]]) -> dict[Any, list[bool]]:
    """What is in each of them, and what each says of it."""
    first = found[0] if found else {}
    return {key: [each[key] for each in found] for key in first if all(key in each for each in found)}


def _attention_sizes(tables: PublishedTables, mixer: Any, tp: int, prompt: bool) -> dict[tuple[int, int], bool]:
    """Measured (requests, context) of a kind of attention, and whether each scores."""
    if not isinstance(mixer, Attention):
        return {}
    kind = "context_attention" if prompt else "generation_attention"
    fixed = {
        "num_heads": mixer.heads // tp,
        "num_key_value_heads": max(mixer.kv_heads // tp, 1),
        "head_dim": mixer.head_dim,
        "window_size": mixer.window or 0,
    }
    return {
        (int(requests), int(isl if prompt else step + 1)): scores
        for requests, isl, step, scores in _rows(tables, kind, fixed, ("batch_size", "isl", "step"))
        if not prompt or (requests == 1 and step == 0)
    }


def _experts_sizes(tables: PublishedTables, experts: Experts, hidden: int, tp: int) -> dict[int, bool]:
    """Measured tokens of experts, and whether each scores."""
    fixed = {
        "hidden_size": hidden,
        "inter_size": experts.width,
        "topk": experts.per_token,
        "num_experts": experts.count,
        "moe_tp_size": tp,
        "moe_ep_size": 1,
    }
    return {int(tokens): scores for tokens, scores in _rows(tables, "moe", fixed, ("num_tokens",))}


def _rows(
    tables: PublishedTables, kind: str, fixed: dict[str, int], sizes: tuple[str, ...]
) -> Iterable[tuple[Any, ...]]:
    """Distinct sizes of the rows of a table in which other sizes are ``fixed``, and whether each scores. None without such a
    table."""
    try:
        columns = tables.table(kind, (), (*sizes, *(name for name in fixed if name != "window_size")))
    except NotMeasured:
        return
    of = np.ones(len(columns[sizes[0]]), bool)
    for name, value in fixed.items():
        of &= columns[name] == value
    for row in np.unique(np.stack([columns[name][of] for name in sizes], 1), axis=0).tolist():
        yield (*row, shape_scores(kind, {**fixed, **dict(zip(sizes, row, strict=True))}))
