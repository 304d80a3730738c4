"""Kinds of published operator tables: the columns that are read of each, and what a set of them is to its readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Columns = Mapping[str, Any]
"""Columns of a table by name: text as arrays of str, numbers as arrays of float."""
Keep = Callable[[str, Any], np.ndarray]
"""Says of a kind of table, a pandas.DataFrame of all its columns, which rows may be read: bool[rows]."""

MILLISECOND = 1e-3
DTYPES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8"}
"""What the tables call dtypes, of matrix products and of KV."""
ELEMENT_BYTES = 2
"""Of an element of a message: the tables count these."""


@dataclass(frozen=True)
class Kind:
    """A kind of table."""

    family: str
    """The folder that the package keeps it in."""
    text: tuple[str, ...]
    numbers: tuple[str, ...]
    """Columns; milliseconds in ``latency``."""
    source: str | None = None
    """What was measured, where that is no engine."""


_HEADS = ("num_heads", "num_key_value_heads", "head_dim")
_PROMPTS, _DECODES = ("batch_size", "isl"), ("batch_size", "step")
_MODULE = ("model", "op_name", "kv_cache_dtype", "gemm_type")
KINDS = {
    "gemm": Kind("gemm", ("gemm_dtype",), ("m", "n", "k", "latency")),
    "context_attention": Kind("attention", ("attn_dtype", "kv_cache_dtype"), (*_PROMPTS, *_HEADS, "latency")),
    "generation_attention": Kind("attention", ("kv_cache_dtype",), (*_DECODES, *_HEADS, "latency")),
    "context_mla": Kind("mla", ("mla_dtype", "kv_cache_dtype"), (*_PROMPTS, "num_heads", "latency")),
    "generation_mla": Kind("mla", ("mla_dtype", "kv_cache_dtype"), (*_DECODES, "num_heads", "latency")),
    "mla_bmm": Kind("mla_bmm", ("op_name", "bmm_dtype"), ("num_tokens", "num_heads", "latency")),
    "mla_context_module": Kind("mla", _MODULE, (*_PROMPTS, "step", "num_heads", "latency")),
    "mla_generation_module": Kind("mla", _MODULE, (*_DECODES, "num_heads", "latency")),
    "dsa_context_module": Kind("sparse_attention", _MODULE, (*_PROMPTS, "step", "num_heads", "latency")),
    "dsa_generation_module": Kind("sparse_attention", _MODULE, (*_DECODES, "num_heads", "latency")),
    "gdn": Kind(
        "linear_attention",
        ("phase", "kernel_source"),
        (
            *("batch_size", "seq_len", "d_model", "d_conv"),
            *("num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim", "latency"),
        ),
    ),
    "moe": Kind(
        "moe",
        ("moe_dtype", "distribution"),
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "latency"),
    ),
    "custom_allreduce": Kind("comm", ("kernel_source",), ("num_gpus", "message_size", "latency")),
    "nccl": Kind("comm", ("nccl_dtype", "op_name"), ("num_gpus", "message_size", "latency"), source="nccl"),
}
OPTIONAL = {"window_size": 0.0}
"""Columns that some tables lack, and what their rows have."""


class Tables(Protocol):
    """A set of tables, by kind; its text is what a message names it by."""

    @property
    def version(self) -> str:
        """Version of the engine that they are wanted for."""
        ...

    def table(self, kind: str) -> Columns:
        """Columns of a table, and those of :data:`OPTIONAL`. Raises NotMeasured where there is none, or no row to be read,
        ProfileError for one that cannot be read."""
        ...

    def versions(self, kind: str) -> list[str]:
        """Versions of the engine that there is a table of a kind for, the nearest first."""
        ...

    def at(self, version: str) -> Tables:
        """The same tables for another version of the engine."""
        ...

    def elsewhere(self) -> list[Tables]:
        """Tables of the same GPU under other engines."""
        ...

    def named(self, version: str, kind: str) -> str:
        """What a table of a version was measured under, in words."""
        ...


def shortest(keys: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of keys, [n] or [n, axes], and the shortest time of each: engines take the best of several kernels."""
    unique, place = np.unique(keys, axis=0, return_inverse=True)
    best = np.full(len(unique), np.inf)
    np.minimum.at(best, place.reshape(-1), seconds)
    return unique, best


def rows_where(columns: Columns, **wanted: float | str) -> np.ndarray:
    """Which rows have these values, bool[rows]."""
    of = np.ones(len(columns["latency"]), bool)
    for name, value in wanted.items():
        of &= np.asarray(columns[name]) == value
    return of
