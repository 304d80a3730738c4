"""Which rows of a published table of attention are of the kernel that an engine takes.

An engine attends with one kernel, of its backend for the GPU. Some tables hold another one's times as well: of the same
shapes, or of head counts that were measured under it alone, up to 35 times slower: SGLang's Triton beside
TensorRT-LLM's on B200, which it takes by default (github.com/sgl-project/sglang/pull/19030). A look-up that took the
shortest of both, or one's for a shape and the other's for the next, would be of no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ATTENTION = ("context_attention", "generation_attention")
"""Kinds of tables."""
KERNEL = "kernel_source"
SLICE = ("attn_dtype", "kv_cache_dtype", "head_dim", "window_size")
"""Columns, as far as there are such, whose values divide a table into parts that are looked up each alone."""
HEADS = ("num_heads", "num_key_value_heads")
SIZES = ("batch_size", "isl", "step")


def of_one_kernel(table: Mapping[str, Any]) -> np.ndarray:
    """Which rows are of the kernel with most rows of a slice, or of one that goes on where that one ends: the same heads at
    no size that the other has, as kernels of prompts and of decodes under one backend; bool[rows]."""
    kept = np.ones(len(table["latency"]), bool)
    if KERNEL not in table or not (kernels := _groups(table, (KERNEL,))).any():
        return kept
    slices = _groups(table, SLICE)
    several = [part for part in range(slices.max() + 1) if len(np.unique(kernels[slices == part])) > 1]
    if not several:
        return kept
    heads, points = _groups(table, HEADS), _groups(table, (*HEADS, *SIZES))
    for part in several:
        of = np.flatnonzero(slices == part)
        counts = np.bincount(kernels[of])
        main = of[kernels[of] == counts.argmax()]
        for kernel in np.flatnonzero(counts):
            other = of[kernels[of] == kernel]
            foreign = not np.isin(heads[other], heads[main]).all() or np.isin(points[other], points[main]).any()
            kept[other] = kernel == counts.argmax() or not foreign
    return kept


def _groups(table: Mapping[str, Any], names: tuple[str, ...]) -> np.ndarray:
    """A number for each row, the same where the columns that there are of ``names`` have the same values, int[rows]."""
    columns = [np.unique(np.asarray(table[name]), return_inverse=True)[1] for name in names if name in table]
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
