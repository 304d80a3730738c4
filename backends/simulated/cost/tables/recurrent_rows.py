"""Linear attention out of published tables: the convolution and the delta rule of prompts and of decodes."""

from __future__ import annotations

import numpy as np

from backends.checkpoint.layer_kinds import GatedDelta
from backends.simulated.cost.models.filled_grid import Shape, beside
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts
from backends.simulated.cost.models.operator_tables import Grid, NotMeasured
from backends.simulated.cost.tables.table_kinds import MILLISECOND, Tables, rows_where, shortest

CONVOLUTION = "causal_conv1d"
"""Beginning of the names of kernels of the short convolution; the others are of the delta rule."""


def gated_delta_of(tables: Tables, mixer: GatedDelta, tp: int) -> tuple[MeasuredPrompts, MeasuredDecodes]:
    """Prompts and decodes of a layer. Raises :class:`NotMeasured`."""
    heads = np.array([float(mixer.value_heads // tp)])
    fitted = Shape(*_summed(tables, mixer, tp, "context"), _prompt_terms)
    prompts = Grid(fitted.axes[:2], fitted.seconds([*fitted.axes[:2], heads])[:, :, 0])
    before, last = prompts.axes[1][-2:]
    token_s = max((prompts.at(1, last) - prompts.at(1, before)) / (last - before), 0.0)
    where, seconds = _summed(tables, mixer, tp, "generation")
    fitted = Shape(where[:, (0, 2)], seconds, _decode_terms)
    decodes = Grid(fitted.axes[:1], fitted.seconds([fitted.axes[0], heads])[:, 0])
    return MeasuredPrompts(prompts, token_s=token_s), MeasuredDecodes(decodes)


def _prompt_terms(points: np.ndarray) -> np.ndarray:
    """Of (prompts, tokens of each, value heads): a launch, chunks of one prompt after the other, tokens of every head."""
    prompts, tokens, heads = points.T
    return np.column_stack((np.ones(len(points)), tokens, prompts * tokens * heads))


def _decode_terms(points: np.ndarray) -> np.ndarray:
    """Of (decodes, value heads): a launch, decodes, states of every head."""
    decodes, heads = points.T
    return np.column_stack((np.ones(len(points)), decodes, decodes * heads))


def _summed(tables: Tables, mixer: GatedDelta, tp: int, phase: str) -> tuple[np.ndarray, np.ndarray]:
    """(requests, tokens of each, value heads), and the seconds of both kernels together; of as many heads as there are on a
    GPU, and of the next fewer and more with as many on a key head."""
    columns = tables.table("gdn")
    of = rows_where(
        columns, phase=phase, d_conv=mixer.conv_kernel, head_k_dim=mixer.key_dim, head_v_dim=mixer.value_dim
    )
    have = columns["num_v_heads"]
    of &= columns["num_k_heads"] * mixer.value_heads == have * mixer.key_heads
    heads = mixer.value_heads // tp
    if heads not in have[of]:
        raise NotMeasured(f"{tables}: gdn: no rows for {mixer.described}, tp {tp}")
    of &= np.isin(have, beside(np.unique(have[of]), heads))
    convolves = np.char.startswith(np.asarray(columns["kernel_source"]), CONVOLUTION)
    parts = []
    for one in (of & convolves, of & ~convolves):
        where = np.stack((columns["batch_size"][one], columns["seq_len"][one], have[one]), axis=1)
        points, seconds = shortest(where, columns["latency"][one] * MILLISECOND)
        parts.append({tuple(point): float(time) for point, time in zip(points, seconds, strict=True)})
    both = [point for point in parts[0] if point in parts[1]]
    if len({tokens for _, tokens, _ in both}) < (2 if phase == "context" else 1):
        raise NotMeasured(f"{tables}: gdn: no rows for {mixer.described}, tp {tp}")
    return np.array(both), np.array([parts[0][point] + parts[1][point] for point in both])
