"""Matrix products, routed experts and collectives out of published tables."""

from __future__ import annotations

import numpy as np

from backends.checkpoint.layer_kinds import Experts
from backends.simulated.cost.models.operator_tables import Curve, Grid, NotMeasured
from backends.simulated.cost.tables.table_kinds import ELEMENT_BYTES, MILLISECOND, Tables, rows_where, shortest


class Products:
    """Matrix products of one dtype, under the name that the tables have for it. Raises :class:`NotMeasured`.

    Times are interpolated over the shape of the weights in logarithms, and so over tokens where a shape lacks some.
    """

    def __init__(self, tables: Tables, dtype: str) -> None:
        self._tables = tables
        columns = tables.table("gemm")
        of = rows_where(columns, gemm_dtype=dtype)
        if not of.any():
            raise NotMeasured(f"{tables}: no matrix products in {dtype}")
        wide, deep, tokens = (columns[name][of] for name in ("n", "k", "m"))
        self.counts, self._widths, self._depths = np.unique(tokens), np.unique(wide), np.unique(deep)
        full = np.full((len(self._widths), len(self._depths), len(self.counts)), np.inf)
        where = (
            np.searchsorted(self._widths, wide),
            np.searchsorted(self._depths, deep),
            np.searchsorted(self.counts, tokens),
        )
        # Where several kernels were measured, the engine takes the best.
        np.minimum.at(full, where, np.log(columns["latency"][of] * MILLISECOND))
        full[np.isinf(full)] = np.nan
        self._log = full

    def curve(self, width: int, depth: int) -> Curve:
        """Seconds over tokens of a product with weights of ``depth`` by ``width``."""
        (n, beyond_n), (k, beyond_k) = _between(self._widths, width), _between(self._depths, depth)
        total = np.zeros(len(self.counts))
        weights = 0.0
        for i, a in n:
            for j, b in k:
                if a * b and (line := self._line(i, j)) is not None:
                    total += a * b * line
                    weights += a * b
        if not weights:
            raise NotMeasured(f"{self._tables}: no matrix products near {depth} x {width}")
        return Curve(self.counts, np.exp(total / weights) * beyond_n * beyond_k)

    def _line(self, i: int, j: int) -> np.ndarray | None:
        """Logarithms of the seconds of one shape of weights over all counts of tokens; None where half of them or more are
        missing."""
        line: np.ndarray = self._log[i, j]
        known = ~np.isnan(line)
        if known.all():
            return line
        if known.sum() < 2:
            return None
        at = np.log(self.counts)
        filled: np.ndarray = np.interp(at, at[known], line[known])
        last = int(known.nonzero()[0][-1])
        filled[last + 1 :] += at[last + 1 :] - at[last]
        return filled


def _between(axis: np.ndarray, value: float) -> tuple[list[tuple[int, float]], float]:
    """Places on an axis and their weights in its logarithm, and by how much the value lies beyond its end."""
    if value >= axis[-1]:
        return [(len(axis) - 1, 1.0)], value / axis[-1]
    if value <= axis[0]:
        return [(0, 1.0)], 1.0
    high = int(np.searchsorted(axis, value))
    part = float(np.log(value / axis[high - 1]) / np.log(axis[high] / axis[high - 1]))
    return [(high - 1, 1 - part), (high, part)], 1.0


def experts_grid(tables: Tables, experts: Experts, hidden: int, tp: int, ep: int, dtype: str, load: str) -> Grid:
    """The routed experts of a layer, each divided over ``tp`` GPUs or all of them spread over ``ep``, held in a
    dtype, under a distribution of tokens over experts: (tokens of all GPUs, distinct experts). Raises
    :class:`NotMeasured`."""
    columns = tables.table("moe")
    of = rows_where(
        columns,
        moe_dtype=dtype,
        distribution=load,
        hidden_size=experts.latent or hidden,
        inter_size=experts.width,
        topk=experts.per_token,
        num_experts=experts.count,
        moe_tp_size=tp,
        moe_ep_size=ep,
    )
    if not of.any():
        raise NotMeasured(f"{tables}: moe: no rows for {experts.described}, tp {tp}, ep {ep}, {load}")
    tokens, seconds = shortest(columns["num_tokens"][of], columns["latency"][of] * MILLISECOND)
    # How many experts the tokens use was part of the measurement: the same time at any count.
    return Grid((tokens.tolist(), [0.0, float(experts.count)]), np.repeat(seconds[:, None], 2, axis=1))


def all_reduce_grid(tables: Tables, gpus: int) -> Grid:
    """An all-reduce over ``gpus`` GPUs, in a captured graph: (bytes,). Raises :class:`NotMeasured`."""
    columns = tables.table("custom_allreduce")
    of = rows_where(columns, num_gpus=gpus)
    of &= np.char.endswith(np.asarray(columns["kernel_source"]), "_graph")
    return _by_bytes(tables, "custom_allreduce", of, gpus)


def collective_grid(tables: Tables, operator: str, gpus: int) -> Grid:
    """An ``all_gather`` or ``reduce_scatter`` over ``gpus`` GPUs: (bytes of the whole message,). Raises
    :class:`NotMeasured`."""
    of = rows_where(tables.table("nccl"), op_name=operator, num_gpus=gpus, nccl_dtype="half")
    return _by_bytes(tables, "nccl", of, gpus)


def _by_bytes(tables: Tables, kind: str, of: np.ndarray, gpus: int) -> Grid:
    columns = tables.table(kind)
    if not of.any():
        raise NotMeasured(f"{tables}: {kind}: no rows for {gpus} GPUs")
    sizes, seconds = shortest(columns["message_size"][of] * ELEMENT_BYTES, columns["latency"][of] * MILLISECOND)
    return Grid((sizes.tolist(),), seconds)
