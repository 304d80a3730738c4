"""Whole steps of models out of published operator tables, and what the cost models say of them.

A step is decodes of equal contexts, or one whole prompt, at sizes at which the attention of a model (and its experts) was
measured, on a GPU that it fits and whose tables have every other operator of its layers. Its truth is the sum of these, as
``--cost measured`` adds them up: products with weights between measured sizes, and all-reduces between measured
messages, are interpolated. Norms, activations, embedding, output head and sampler are left out on all sides.

A shape of an operator fits or scores (``halves.py``). A step scores where the rows of its attention and of its experts
do, and most of the weights of its products lie between rows that do. It is predicted by ``--cost measured`` without any
row that scores, and by the roofline, which is fitted to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from backends.checkpoint.layer_kinds import Attention, Dense, Experts, GatedDelta, Latent, Mixer, Recurrent
from backends.checkpoint.precision import Held, Precision
from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, load_model
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.operator_tables import NotMeasured, OperatorTables, ProfileError, Provenance
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables.attention_kernels import ATTENTION, of_one_kernel
from backends.simulated.cost.tables.measured_operators import MEASURED_SKEW, OperatorReader
from backends.simulated.cost.tables.product_shapes import around_mixer, of_mlp
from backends.simulated.cost.tables.published_package import ENGINES, PublishedTables, at_hand, find_tables
from backends.simulated.cost.tables.table_kinds import DTYPES
from benchmarks.board.halves import rows_score
from benchmarks.board.predict import nearest_preset
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
    model, gpu = load_model(case.model), load_gpu(case.gpu).under(case.engine)
    weights = BLOCKS if case.dtype == "fp8_block" else model.precision(case.dtype)
    want = CostRequest(model, gpu, weights, KV_DTYPE, case.tp, engine=case.engine)
    if (why := model.unsplit(case.tp)) is not None:
        return f"tp {case.tp} does not divide its {why}"
    try:
        full, lacking = _read(want, find_tables(gpu, case.engine))
        if lacking:
            return f"not measured: {lacking[0]}"
        measured = _cost(_read(want, find_tables(gpu, case.engine, fits))[0], want)
    except ProfileError as error:
        return str(error)
    truth = _cost(full, want)
    roofline = RooflineCost(
        model, gpu, dtype=weights, kv_dtype=KV_DTYPE, tp=case.tp, capture_sizes=[], expert_skew=MEASURED_SKEW
    )
    room = gpu.memory_bytes - model.weight_bytes(weights, case.tp)
    found = []
    for requests, context, prompt, scores in _sizes(find_tables(gpu, case.engine), want, full):
        if requests * (context * model.kv_bytes_per_token(KV_DTYPE, case.tp) + model.state_bytes(case.tp)) > room:
            continue
        step = _batch(requests, context, prompt)
        seconds = [_counted(cost.explain(step)) for cost in (truth, measured, roofline)]
        found.append(Step(case, kind_of(model), requests, context, prompt, scores, *seconds))
    return found or "measured at no size that fits the GPU's memory"


def fits(kind: str, table: pd.DataFrame) -> np.ndarray:
    """Which rows of a table predictions may know: those that do not score, bool[rows]."""
    return ~rows_score(kind, table)


def _read(want: CostRequest, tables: PublishedTables) -> tuple[OperatorTables, list[str]]:
    """The operators of a model, and those of its layers that are not among them."""
    reader = OperatorReader(want, tables)
    found = reader.read(Provenance(tables.system, "aiconfigurator", tables.system.name, want.dtype))
    return found, [what for what in reader.lacking if not what.startswith("output head")]


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

Sizes = dict[tuple[int, int], bool]
"""(requests, context), whether each scores; a context of 0 stands for any."""


def _sizes(tables: PublishedTables, want: CostRequest, full: OperatorTables) -> Iterator[tuple[int, int, bool, bool]]:
    """Requests, context, whether it is a prompt, and whether the step scores."""
    model = want.model
    layers = dict.fromkeys(model.stack)
    mixers = list(dict.fromkeys(layer.mixer for layer in layers if layer.mixer is not None))
    experts = dict.fromkeys(layer.mlp for layer in layers if isinstance(layer.mlp, Experts))
    shapes = [
        shape
        for mixer in mixers
        if not full.mixers[mixer].whole
        for shape in around_mixer(mixer, model.hidden, want.tp).values()
    ]
    for mlp in dict.fromkeys(layer.mlp for layer in layers):
        if isinstance(mlp, Dense):
            shapes += of_mlp("", model.hidden, mlp.width // want.tp, mlp.gated).values()
    of_products = _product_tokens(tables, shapes)
    of_experts = [_expert_tokens(tables, each, model.hidden, want.tp) for each in experts]
    for prompt in (False, True):
        of_mixers = [_mixer_sizes(tables, each, want.tp, prompt, full.mixers[each].whole) for each in mixers]
        for requests, context in sorted({size for each in of_mixers for size in each if size[1]}):
            tokens = context if prompt else requests
            if requests > MOST_DECODES or not CONTEXTS[0] <= context <= CONTEXTS[1]:
                continue
            halves = [each.get((requests, context), each.get((requests, 0))) for each in of_mixers]
            halves += [each.get(tokens) for each in (*of_experts, of_products)]
            if None not in halves:
                yield requests, context, prompt, all(halves)


def _mixer_sizes(tables: PublishedTables, mixer: Mixer, tp: int, prompt: bool, whole: bool) -> Sizes:
    """Measured sizes of attention or a recurrence; ``whole``: with the products around."""
    if isinstance(mixer, GatedDelta):
        wanted: dict[str, int | str] = {
            "phase": "context" if prompt else "generation",
            "num_k_heads": mixer.key_heads // tp,
            "num_v_heads": mixer.value_heads // tp,
            "head_k_dim": mixer.key_dim,
            "head_v_dim": mixer.value_dim,
        }
        rows = _rows(tables, "gdn", wanted)
        contexts = rows.seq_len if prompt else 0 * rows.seq_len
    else:
        wanted = {"num_heads": mixer.heads // tp, "kv_cache_dtype": DTYPES[KV_DTYPE]}
        if isinstance(mixer, Attention):
            wanted |= {"num_key_value_heads": max(mixer.kv_heads // tp, 1), "head_dim": mixer.head_dim}
            wanted |= {"window_size": mixer.window or 0}
            kinds = "context_attention", "generation_attention"
        else:
            kinds = ("mla_context_module", "mla_generation_module") if whole else ("context_mla", "generation_mla")
        rows = _rows(tables, kinds[not prompt], wanted)
        if prompt and len(rows):
            rows = rows[rows.step.eq(0)]
        # The tables of modules count the token that is decoded, the others do not.
        contexts = rows.isl if prompt else rows.step + (not whole)
    sizes: Sizes = {}
    for requests, context, scores in zip(rows.batch_size, contexts, rows.scores, strict=True):
        if not prompt or requests == 1:
            sizes[int(requests), int(context)] = bool(scores)
    return sizes


def _expert_tokens(tables: PublishedTables, experts: Experts, hidden: int, tp: int) -> dict[int, bool]:
    """Measured tokens of experts, and whether each scores."""
    wanted: dict[str, int | str] = {
        "hidden_size": experts.latent or hidden,
        "inter_size": experts.width,
        "topk": experts.per_token,
        "num_experts": experts.count,
        "moe_tp_size": tp,
        "moe_ep_size": 1,
    }
    rows = _rows(tables, "moe", wanted)
    return dict(zip(rows.num_tokens.astype(int), rows.scores.astype(bool), strict=True))


def _product_tokens(tables: PublishedTables, shapes: Sequence[tuple[int, int]]) -> dict[int, bool]:
    """Measured tokens of products, and whether most of the weights lie between rows that score; none where a shape lies
    between sizes that were not measured together."""
    rows = _rows(tables, "gemm", {}).groupby(["n", "k", "m"]).scores.first()
    axes = [np.unique(rows.index.get_level_values(name)) for name in ("n", "k")]
    score = weights = 0.0
    for shape in shapes:
        corners = [
            rows.loc[n, k] for n in _about(axes[0], shape[0]) for k in _about(axes[1], shape[1]) if (n, k) in rows.index
        ]
        if not corners:
            return {}
        score = score + shape[0] * shape[1] * pd.concat(corners, axis=1).mean(axis=1)
        weights += shape[0] * shape[1]
    if not shapes:
        return dict.fromkeys(rows.index.get_level_values("m").astype(int), True)
    return {int(tokens): bool(part >= weights / 2) for tokens, part in score.items()}  # type: ignore[attr-defined]


def _about(axis: np.ndarray, value: float) -> np.ndarray:
    """The measured sizes next to one: itself, or the one below and the one above."""
    high = min(int(np.searchsorted(axis, value)), len(axis) - 1)
    return axis[high : high + 1] if axis[high] <= value or not high else axis[high - 1 : high + 1]


def _rows(tables: PublishedTables, kind: str, wanted: Mapping[str, int | str]) -> pd.DataFrame:
    """The rows of a table with these values, and whether each scores; a size that the table lacks is 0. No rows where there
    is no such table."""
    try:
        rows = _frame(tables.file_of(kind), kind)
    except NotMeasured:
        return pd.DataFrame(columns=["batch_size", "isl", "step", "seq_len", "num_tokens", "n", "k", "m", "scores"])
    of = np.ones(len(rows), bool)
    for name, value in wanted.items():
        of &= rows[name].eq(value) if name in rows else value == 0
    return rows[of]


@lru_cache(maxsize=16)
def _frame(file: Path, kind: str) -> pd.DataFrame:
    rows = pd.read_parquet(file)
    rows = rows.assign(scores=rows_score(kind, rows))
    return rows[of_one_kernel(rows)] if kind in ATTENTION else rows
