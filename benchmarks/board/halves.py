"""Which half of what was measured a thing belongs to: what is fitted to, or what is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd

from backends.simulated.cost.tables.attention_kernels import ATTENTION
from backends.simulated.cost.tables.table_kinds import OPTIONAL

NO_SIZES = ("latency", "beam_width", "tp_size")
"""Columns of numbers of published operator tables that are no sizes of what was computed."""


def scores(joined: str) -> bool:
    """Whether something belongs to scoring, by the last hexadecimal digit of the SHA-256 of what it is, joined with ``|``:
    odd scores, even fits."""
    return int(hashlib.sha256(joined.encode()).hexdigest()[-1], 16) % 2 == 1


def shape_scores(kind: str, sizes: Mapping[str, float]) -> bool:
    """Whether a shape of an operator belongs to scoring: its ``kind`` (the name of its table, as in ``gemm``) and its
    sizes in the order of their names, whatever engine, GPU, dtype or kernel it was measured with."""
    return scores("|".join([kind, *(f"{int(sizes[name])}" for name in sorted(sizes))]))


def rows_score(kind: str, table: pd.DataFrame) -> np.ndarray:
    """Whether each row of an operator's published table is of a shape that belongs to scoring, bool[n]."""
    numbers = [name for name in table.columns if pd.api.types.is_numeric_dtype(table[name]) and name not in NO_SIZES]
    sizes = table[numbers]
    if kind in ATTENTION:
        sizes = sizes.assign(**{name: value for name, value in OPTIONAL.items() if name not in numbers})
    shapes, of = np.unique(sizes[sorted(sizes)].to_numpy(np.int64), axis=0, return_inverse=True)
    half = [_scores("|".join(map(str, (kind, *shape)))) for shape in shapes.tolist()]
    return np.array(half, bool)[of.reshape(-1)]


_scores = cache(scores)  # tables of other GPUs and engines have the same shapes
