"""Attention tables from measured points, whatever file they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backends.simulated.cost.models.operator_tables import AttentionTable, ProfileError, grid_from_points
from backends.simulated.cost.models.uneven import uneven_grid


def attention_table(
    points: np.ndarray,
    seconds: np.ndarray,
    where: Path,
    uneven: dict[str, np.ndarray] | None = None,
    *,
    prompts: np.ndarray | None = None,
) -> AttentionTable:
    """Tables from ``points``, float[n, 4]: prompt tokens, cached tokens before them, decodes beside them, and the
    context tokens of each decode; and ``seconds``, float[n]. ``prompts``, float[n], says into how many equal prompts the
    prompt tokens divide, each after so many cached ones; then the table is by the keys that a prompt token sees.

    ``uneven`` holds batches of decodes of two lengths, see :func:`uneven_grid`. Raises :class:`ProfileError`, naming
    ``where``, when there are no decodes alone or no prompts.
    """
    if prompts is not None:
        points = points.copy()
        points[:, 1] += points[:, 0] / np.maximum(prompts, 1) / 2
    # What was not measured: by cached tokens, along the prompt first, where time is smoothest (along the context it has a
    # knee where the GPU's caches overflow); by keys, along these, in which it is linear.
    order = (0, 1, 3, 2) if prompts is None else (1, 0, 3, 2)
    alone = (points[:, 0] == 0) & (points[:, 2] > 0)
    beside = points[:, 0] > 0
    if not alone.any() or not beside.any():
        raise ProfileError(f"{where}: needs rows of decodes alone and rows of prompts")
    bare = beside & (points[:, 2] == 0)
    both = beside & ~bare
    decode = grid_from_points(points[alone][:, (2, 3)], seconds[alone], (1, 0))
    if both.any():
        # Without decodes their length means nothing: the same time at every length.
        lengths = np.unique(points[both, 3])
        spread = np.repeat(points[bare], len(lengths), axis=0)
        spread[:, 3] = np.tile(lengths, int(bare.sum()))
        all_points = np.concatenate((points[both], spread))
        all_seconds = np.concatenate((seconds[both], np.repeat(seconds[bare], len(lengths))))
        mixed = grid_from_points(all_points, all_seconds, order)
    else:
        # Never measured together: one after the other.
        without = grid_from_points(points[bare][:, :2], seconds[bare], order[:2])
        chunks, prefixes = without.axes
        counts, contexts = ([0.0, *axis] for axis in decode.axes)
        each = [[without.at(c, k) for k in prefixes] for c in chunks]
        beside_s = [[decode.at(n, kv) if n and kv else 0.0 for kv in contexts] for n in counts]
        at = [(c, k, n, kv) for c in chunks for k in prefixes for n in counts for kv in contexts]
        total = np.array(each)[:, :, None, None] + np.array(beside_s)[None, None]
        mixed = grid_from_points(np.array(at), total.reshape(-1), (0, 1, 3, 2))

    def equal_s(chunk: float, prefix: float, count: float, mean: float) -> float:
        second = prefix if prompts is None else prefix + chunk / 2
        return mixed.at(chunk, second, count, mean) if chunk else decode.at(count, mean)

    pure = with_prompt = None
    if uneven is not None and len(uneven["seconds"]):
        pure, with_prompt = uneven_grid(uneven, equal_s)
    return AttentionTable(decode, mixed, with_prompt, pure, prompts is not None)
