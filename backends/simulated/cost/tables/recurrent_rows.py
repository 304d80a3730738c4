"""Linear attention out of published tables: the convolution and the delta rule of prompts and of decodes."""

from __future__ import annotations

import numpy as np

from backends.checkpoint.layer_kinds import GatedDelta
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts
from backends.simulated.cost.models.operator_tables import Grid, NotMeasured, grid_from_points
from backends.simulated.cost.tables.table_kinds import MILLISECOND, Tables, rows_where, shortest

CONVOLUTION = "causal_conv1d"
"""Beginning of the names of kernels of the short convolution; the others are of the delta rule."""


def gated_delta_of(tables: Tables, mixer: GatedDelta, tp: int) -> tuple[MeasuredPrompts, MeasuredDecodes]:
    """Prompts and decodes of a layer. Raises :class:`NotMeasured`."""
    prompts = grid_from_points(*_summed(tables, mixer, tp, "context"), (0, 1))
    where, seconds = _summed(tables, mixer, tp, "generation")
    before, last = prompts.axes[1][-2:]
    token_s = max((prompts.at(1, last) - prompts.at(1, before)) / (last - before), 0.0)
    return MeasuredPrompts(prompts, token_s=token_s), MeasuredDecodes(Grid((where[:, 0].tolist(),), seconds))


def _summed(tables: Tables, mixer: GatedDelta, tp: int, phase: str) -> tuple[np.ndarray, np.ndarray]:
    """(requests, tokens of each), and the seconds of both kernels together."""
    columns = tables.table("gdn")
    of = rows_where(
        columns,
        phase=phase,
        d_conv=mixer.conv_kernel,
        num_k_heads=mixer.key_heads // tp,
        head_k_dim=mixer.key_dim,
        num_v_heads=mixer.value_heads // tp,
        head_v_dim=mixer.value_dim,
    )
    convolves = np.char.startswith(np.asarray(columns["kernel_source"]), CONVOLUTION)
    parts = []
    for one in (of & convolves, of & ~convolves):
        where = np.stack((columns["batch_size"][one], columns["seq_len"][one]), axis=1)
        points, seconds = shortest(where, columns["latency"][one] * MILLISECOND)
        parts.append({tuple(point): float(time) for point, time in zip(points, seconds, strict=True)})
    both = [point for point in parts[0] if point in parts[1]]
    if len({tokens for _, tokens in both}) < (2 if phase == "context" else 1):
        raise NotMeasured(f"{tables}: gdn: no rows for {mixer.described}, tp {tp}")
    return np.array(both), np.array([parts[0][point] + parts[1][point] for point in both])
