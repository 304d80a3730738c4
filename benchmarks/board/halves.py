"""Which half something measured belongs to: one to fit to, the other to score by.

By the last hexadecimal digit of the SHA-256 of what names it, joined with ``|``: even fits, odd scores. So the same
everywhere, and nobody chose it. The shape of an operator is what does not change while an engine runs: all counts of
tokens and all contexts of one shape belong to one half.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

SHAPES = {
    "gemm": ("n", "k"),
    "moe": ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "context_attention": ("num_heads", "num_key_value_heads", "head_dim", "window_size"),
    "generation_attention": ("num_heads", "num_key_value_heads", "head_dim", "window_size"),
    "context_mla": ("num_heads",),
    "generation_mla": ("num_heads",),
}
"""Columns of a published table that make a shape, in the order in which they are joined. Those that a table lacks are 0."""


def scores(joined: str) -> bool:
    """Whether what is named so belongs to scoring; else to fitting."""
    return int(hashlib.sha256(joined.encode()).hexdigest()[-1], 16) % 2 == 1


def shape_scores(kind: str, *shape: int) -> bool:
    """Whether a shape of an operator belongs to scoring: its kind, and the values of :data:`SHAPES`."""
    return scores("|".join([kind, *(str(int(value)) for value in shape)]))


def scoring_rows(kind: str, table: pd.DataFrame) -> np.ndarray:
    """Which rows of a published table are of shapes that belong to scoring, bool[rows]."""
    columns = [table[name] if name in table else pd.Series(0, index=table.index) for name in SHAPES[kind]]
    shapes = pd.MultiIndex.from_arrays(columns)
    codes, distinct = pd.factorize(shapes)
    belongs = np.array([shape_scores(kind, *shape) for shape in distinct], bool)
    found: np.ndarray = belongs[codes]
    return found
