"""AIConfigurator's operator tables: one set of files a GPU and engine, for operators of any shape, milliseconds.

What an operator is read from is a :class:`Tables`: here the CSV form, in ``published_package`` the Parquet files of the
package. ``PATH`` is the common beginning of the files (``.../h100_sxm_sglang-0.5.14``) or the folder that holds them. Matrix
products are interpolated over their shape in the logarithms; attention is that of the model's heads and must have been
measured. Prompts were only measured whole: a cached prefix is charged with the pairs it adds, at the rate of long
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU, same_gpu
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.attention_table import attention_table
from backends.simulated.cost.models.operator_tables import (
    AttentionTable,
    Curve,
    Grid,
    NotMeasured,
    OperatorTables,
    ProfileError,
    Provenance,
)
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables.csv_table import find_table, read_table

MILLISECOND = 1e-3
KINDS = ("gemm", "context_attention", "generation_attention", "moe", "custom_allreduce")
DTYPES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8"}
"""What the tables call dtypes, of matrix products and of KV."""
EXPERT_LOAD = "power_law_1.01"
"""Name of the mildly uneven one of the measured distributions of tokens over experts."""
PREFIXES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ELEMENT_BYTES = 2
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
OPTIONAL = {"window_size": 0.0}
"""Columns that some sets lack, and what their rows have."""


class Tables(Protocol):
    """A set of tables, by kind; its text is what a message names it by."""

    def table(self, kind: str, text: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Any]:
        """Columns of a table: ``text`` as str, ``numbers`` as float arrays, with those of :data:`OPTIONAL`. Raises
        :class:`ProfileError`."""
        ...


@dataclass(frozen=True)
class CsvTables:
    """A set in CSV form."""

    base: Path
    """Common beginning of the files."""

    def table(self, kind: str, text: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Any]:
        """Columns of a table."""
        return _read(self.base, kind, text, numbers)

    def __str__(self) -> str:
        return str(self.base)


def sets(path: Path) -> list[Path]:
    """The sets of tables that ``path`` means: itself, or those in the folder."""
    if find_table(path.parent, f"{path.name}_gemm", missing_ok=True) is not None:
        return [path]
    if not path.is_dir():
        return []
    return sorted({file.with_name(file.name.split("_gemm.csv")[0]) for file in path.glob("*_gemm.csv*")})


def provenance(path: Path) -> Provenance:
    """Describe the origin of one set of tables."""
    gpu, _, engine = path.name.rpartition("_")
    name, _, version = engine.partition("-")
    return Provenance(path, "aiconfigurator", gpu, "bf16", None, f"{name} {version}".strip())


def read(path: Path, tp: int, model: ModelSpec, gpu: GPU, dtype: str) -> OperatorTables:
    """The tables of a model on the set's GPU. Raises :class:`ProfileError` for shapes that were not measured."""
    found = [one for one in sets(path) if same_gpu(provenance(one).gpu, gpu.name)]
    if not found:
        have = ", ".join(provenance(one).gpu for one in sets(path))
        raise ProfileError(f"{path}: measured on {have}, not {gpu.name}")
    base = found[0]
    if dtype not in DTYPES:
        raise ProfileError(f"{base}: no matrix products with {dtype} weights; it has {', '.join(DTYPES)}")
    if model.mla is not None:
        raise ProfileError(f"{base}: {model.name}: its latent attention is in no table here; use roofline")
    tables = CsvTables(base)
    gemm = Products(tables, DTYPES[dtype])
    hidden, head = model.hidden, model.head_dim
    heads, kv_heads = model.heads // tp, max(model.kv_heads // tp, 1)
    layer = {
        "qkv_proj": gemm.curve((heads + 2 * kv_heads) * head, hidden),
        "o_proj": gemm.curve(hidden, heads * head),
        "elementwise": _elementwise(model, gpu, tp, dtype, gemm.counts),
    }
    if not all(model.moe_layers):
        inner = model.intermediate // tp
        layer["gate_up_proj"] = gemm.curve((2 if model.gated_mlp else 1) * inner, hidden)
        layer["down_proj"] = gemm.curve(hidden, inner)
    experts = None
    if any(model.moe_layers):
        kinds = {"fp8": ("fp8", "fp8_block")}.get(dtype, (DTYPES[dtype],))
        experts = experts_grid(tables, model, tp, kinds)
    head_curve = Products(tables, DTYPES["bf16"]).curve(model.vocab // tp, hidden)
    return OperatorTables(
        provenance(base),
        layer,
        {},
        {"lm_head": head_curve},
        attention_of(prompt_rows(tables, heads, kv_heads, head), decode_rows(tables, heads, kv_heads, head), base),
        experts,
        all_reduce_grid(tables, tp) if tp > 1 else None,
        experts_over=tp,
        missing=[
            "norms, rotary and activation functions: by the roofline",
            "sampler: taken as free",
            "prompts after a cached prefix, and prompts beside decodes: one after the other",
        ],
    )


class Products:
    """Matrix products of one dtype, under the name that the tables have for it. Raises :class:`NotMeasured`."""

    def __init__(self, tables: Tables, dtype: str) -> None:
        self._tables = tables
        columns, inner, tokens, seconds = _gemm(tables, dtype)
        self.counts = np.unique(tokens)
        self._widths, self._depths = np.unique(columns), np.unique(inner)
        full = np.full((len(self._widths), len(self._depths), len(self.counts)), np.inf)
        where = (
            np.searchsorted(self._widths, columns),
            np.searchsorted(self._depths, inner),
            np.searchsorted(self.counts, tokens),
        )
        # Where several kernels were measured, the engine takes the best.
        np.minimum.at(full, where, np.log(seconds))
        full[np.isinf(full)] = np.nan
        self._log = full

    def curve(self, width: int, depth: int) -> Curve:
        """Seconds over tokens of a product with weights of ``depth`` by ``width``."""
        (n, beyond_n), (k, beyond_k) = _between(self._widths, width), _between(self._depths, depth)
        total = np.zeros(len(self.counts))
        weights = 0.0
        for i, a in n:
            for j, b in k:
                line = self._log[i, j]
                if a * b and not np.isnan(line).any():
                    total += a * b * line
                    weights += a * b
        if not weights:
            raise NotMeasured(f"{self._tables}: no matrix products near {depth} x {width}")
        return Curve(self.counts, np.exp(total / weights) * beyond_n * beyond_k)


def _between(axis: np.ndarray, value: float) -> tuple[list[tuple[int, float]], float]:
    """Places on an axis and their weights in its logarithm, and by how much the value lies beyond its end."""
    if value >= axis[-1]:
        return [(len(axis) - 1, 1.0)], value / axis[-1]
    if value <= axis[0]:
        return [(0, 1.0)], 1.0
    high = int(np.searchsorted(axis, value))
    part = float(np.log(value / axis[high - 1]) / np.log(axis[high] / axis[high - 1]))
    return [(high - 1, 1 - part), (high, part)], 1.0


@lru_cache(maxsize=4)
def _read(base: Path, kind: str, text: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Any]:
    return read_table(find_table(base.parent, f"{base.name}_{kind}"), text, numbers, OPTIONAL)


def _gemm(tables: Tables, dtype: str) -> tuple[np.ndarray, ...]:
    columns = tables.table("gemm", ("gemm_dtype",), ("m", "n", "k", "latency"))
    of = np.asarray(columns["gemm_dtype"]) == dtype
    if not of.any():
        raise NotMeasured(f"{tables}: no matrix products in {dtype}")
    m, n, k, latency = (columns[name][of] for name in ("m", "n", "k", "latency"))
    return n, k, m, latency * MILLISECOND


def _elementwise(model: ModelSpec, gpu: GPU, tp: int, dtype: str, counts: np.ndarray) -> Curve:
    shape = RooflineCost(model, gpu, dtype=dtype, tp=tp, capture_sizes=[]).stage(0)
    return Curve(counts, [shape.linear(int(count), 0)["elementwise"] / model.layers for count in counts])


def attention_of(prompts: np.ndarray, decodes: np.ndarray, where: Path) -> AttentionTable:
    """The table of :func:`prompt_rows` and :func:`decode_rows`."""
    measured = np.concatenate((prompts, decodes))
    return attention_table(measured[:, :4], measured[:, 4], where)


def prompt_rows(tables: Tables, heads: int, kv_heads: int, head_dim: int, kv_dtype: str = DTYPES["bf16"]) -> np.ndarray:
    """Attention of a prompt, float[n, 5]: its tokens, those cached before it, 0, 0, seconds.

    The rows of prompts after a cached prefix are the measured ones of whole prompts and the pairs that the prefix adds.
    """
    columns = tables.table(
        "context_attention", ("attn_dtype", "kv_cache_dtype"), ("batch_size", "isl", *_HEADS, "latency")
    )
    of = _rows(tables, columns, "context_attention", (heads, kv_heads, head_dim), kv_dtype) & (
        columns["batch_size"] == 1
    )
    length, seconds = _shortest(columns["isl"][of], columns["latency"][of] * MILLISECOND)
    if len(length) < 2:
        raise NotMeasured(f"{tables}: context_attention: fewer than two lengths of one prompt of {heads} heads")
    longest = length[-1]
    per_pair = (seconds[-1] - seconds[-2]) / (longest**2 / 2 - length[-2] ** 2 / 2)
    return np.array(
        [
            (float(c), float(p), 0.0, 0.0, float(s + per_pair * c * p))
            for c, s in zip(length, seconds, strict=True)
            for p in PREFIXES
        ]
    )


def decode_rows(tables: Tables, heads: int, kv_heads: int, head_dim: int, kv_dtype: str = DTYPES["bf16"]) -> np.ndarray:
    """Attention of decodes, float[n, 5]: 0, 0, how many, the context tokens of each, seconds."""
    columns = tables.table("generation_attention", ("kv_cache_dtype",), ("batch_size", "step", *_HEADS, "latency"))
    of = _rows(tables, columns, "generation_attention", (heads, kv_heads, head_dim), kv_dtype)
    keys = columns["batch_size"][of] * 2**32 + columns["step"][of] + 1
    unique, best = _shortest(keys, columns["latency"][of] * MILLISECOND)
    return np.array(
        [(0.0, 0.0, float(key // 2**32), float(key % 2**32), float(s)) for key, s in zip(unique, best, strict=True)]
    )


def heads_beside(tables: Tables, kind: str, heads: int, kv_heads: int, head_dim: int, kv_dtype: str) -> tuple[int, int]:
    """The measured numbers of query heads next below and above ``heads``, on as many KV heads. Raises
    :class:`NotMeasured`."""
    columns = tables.table(kind, ("kv_cache_dtype",), _HEADS)
    of = np.asarray(columns["kv_cache_dtype"]) == kv_dtype
    for name, value in (("num_key_value_heads", kv_heads), ("head_dim", head_dim), ("window_size", 0)):
        of &= columns[name] == value
    have = np.unique(columns["num_heads"][of])
    place = int(np.searchsorted(have, heads))
    if not 0 < place < len(have):
        raise NotMeasured(f"{tables}: {kind}: none about {heads} heads on {kv_heads} KV heads of {head_dim}")
    return int(have[place - 1]), int(have[place])


def _rows(tables: Tables, columns: dict[str, Any], kind: str, shape: tuple[int, int, int], kv_dtype: str) -> np.ndarray:
    """Which rows are of attention of this shape (heads, KV heads, head dimension) that sees every token."""
    of = np.asarray(columns["kv_cache_dtype"]) == kv_dtype
    for name, value in zip((*_HEADS, "window_size"), (*shape, 0), strict=True):
        of &= columns[name] == value
    if "attn_dtype" in columns:
        wide = of & (np.asarray(columns["attn_dtype"]) == DTYPES["bf16"])
        # Some kernels compute in 8 bits alone where KV is.
        of = of if kv_dtype == "fp8" and not wide.any() else wide
    if not of.any():
        heads, kv_heads, head_dim = shape
        raise NotMeasured(f"{tables}: {kind}: no rows for {heads} heads, {kv_heads} KV heads of {head_dim}")
    return of


def _shortest(keys: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys and the shortest time of each, that of the best kernel."""
    unique, place = np.unique(keys, return_inverse=True)
    best = np.full(len(unique), np.inf)
    np.minimum.at(best, place, seconds)
    return unique, best


def experts_grid(tables: Tables, model: ModelSpec, tp: int, dtypes: Sequence[str]) -> Grid:
    """The routed experts of a layer of a model, each divided over ``tp`` GPUs, held in one of ``dtypes``."""
    names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    columns = tables.table("moe", ("moe_dtype", "distribution"), ("num_tokens", *names, "latency"))
    wanted: Sequence[int] = (model.hidden, model.expert_intermediate, model.experts_per_token, model.experts, tp, 1)
    of = np.isin(np.asarray(columns["moe_dtype"]), dtypes) & (np.asarray(columns["distribution"]) == EXPERT_LOAD)
    for name, value in zip(names, wanted, strict=True):
        of &= columns[name] == value
    if not of.any():
        raise NotMeasured(
            f"{tables}: moe: no rows for {model.experts} experts of {model.expert_intermediate}, "
            f"{model.experts_per_token} a token, tp {tp}, {' or '.join(dtypes)}"
        )
    tokens, seconds = _shortest(columns["num_tokens"][of], columns["latency"][of] * MILLISECOND)
    # How many experts the tokens use was part of the measurement: the same time at any count.
    return Grid((tokens.tolist(), [0.0, float(model.experts)]), np.repeat(seconds[:, None], 2, axis=1))


def all_reduce_grid(tables: Tables, tp: int) -> Grid:
    """An all-reduce over ``tp`` GPUs, in a captured graph."""
    columns = tables.table("custom_allreduce", ("backend",), ("num_gpus", "message_size", "latency"))
    of = (columns["num_gpus"] == tp) & np.array([name.endswith("graph") for name in columns["backend"]])
    if not of.any():
        have = ", ".join(str(int(n)) for n in np.unique(columns["num_gpus"]))
        raise NotMeasured(f"{tables}: custom_allreduce: no rows for {tp} GPUs; it has {have}")
    sizes, seconds = _shortest(columns["message_size"][of] * ELEMENT_BYTES, columns["latency"][of] * MILLISECOND)
    return Grid((sizes.tolist(),), seconds)
