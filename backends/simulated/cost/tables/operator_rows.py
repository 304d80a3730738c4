"""Matrix products, routed experts and collectives out of published tables."""

from __future__ import annotations

import numpy as np

from backends.checkpoint.layer_kinds import Experts
from backends.simulated.cost.models.expert_loads import distinct_experts
from backends.simulated.cost.models.filled_grid import Shape, beside, between
from backends.simulated.cost.models.operator_tables import Curve, Grid, NotMeasured
from backends.simulated.cost.tables.table_kinds import ELEMENT_BYTES, MILLISECOND, Tables, rows_where, shortest

LAUNCHED_S = 40e-6
"""Seconds that no kernel of a small product takes: what was timed is how long the CPU takes to launch it, which graphs
spare."""
SMALL_PRODUCTS = 0.1
"""Share of the products of a table that count as small."""
FEW_TOKENS = 64
"""Tokens up to which experts are bound by their weights on every GPU."""
EXPERT_POINT = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
"""Columns that tell what was measured of experts, beside their dtype and the distribution of tokens."""

LOADS = {0.0: "balanced", 1.01: "power_law_1.01", 1.2: "power_law_1.2"}
"""Distributions of tokens over experts by their skew, and what the tables call them."""


def timed_with_launches(tables: Tables, dtype: str) -> bool:
    """Whether the times of matrix products of a dtype are those of their launches."""
    columns = tables.table("gemm")
    of = rows_where(columns, gemm_dtype=dtype)
    return bool(of.any() and np.quantile(columns["latency"][of], SMALL_PRODUCTS) * MILLISECOND > LAUNCHED_S)


def slower_than_16_bits(tables: Tables, dtype: str) -> bool:
    """Whether routed experts in a dtype took longer than the same ones in bf16 where reading weights is what takes time.

    Such rows are not what engines reach: vLLM 0.19's int4 takes 1.6 to 1.9 times as long as its bf16, on H200 and B200, and
    makes the experts alone longer than whole measured steps of Kimi-K2.5; 0.24's takes half. Likewise 0.24's fp8 by tensor
    on Hopper, 2.4 to 3 times (0.19's: 0.7).
    """
    columns = tables.table("moe")
    few = columns["num_tokens"] <= FEW_TOKENS
    loads = np.unique(columns["distribution"], return_inverse=True)[1]
    points = np.column_stack((loads, *(columns[name] for name in EXPERT_POINT)))

    def times(of: str) -> tuple[np.ndarray, np.ndarray]:
        rows = few & rows_where(columns, moe_dtype=of)
        return shortest(points[rows], columns["latency"][rows])

    (there, seconds), (plain, plain_seconds) = times(dtype), times("bfloat16")
    both = np.concatenate((there, plain))
    if dtype == "bfloat16" or not (len(there) and len(plain)):
        return False
    order = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    _, own, other = np.intersect1d(order[: len(there)], order[len(there) :], return_indices=True)
    return bool(len(own) and np.median(seconds[own] / plain_seconds[other]) > 1)


class Products:
    """Matrix products of one dtype, under the name that the tables have for it. Raises :class:`NotMeasured`."""

    def __init__(self, tables: Tables, dtype: str) -> None:
        columns = tables.table("gemm")
        of = rows_where(columns, gemm_dtype=dtype)
        if not of.any():
            raise NotMeasured(f"{tables}: no matrix products in {dtype}")
        if timed_with_launches(tables, dtype):
            raise NotMeasured(f"{tables}: matrix products in {dtype} were timed with their launches")
        where = np.stack([columns[name][of] for name in ("n", "k", "m")], axis=1)
        self._shape = Shape(*shortest(where, columns["latency"][of] * MILLISECOND), _product_terms)
        self.counts = self._shape.axes[2]
        """Tokens at which products were measured."""

    def curve(self, width: int, depth: int) -> Curve:
        """Seconds over tokens of a product with weights of ``depth`` by ``width``."""
        shape = [np.array([float(width)]), np.array([float(depth)]), self.counts]
        return Curve(self.counts, self._shape.seconds(shape).reshape(-1))


def _product_terms(points: np.ndarray) -> np.ndarray:
    """A launch, the weights, activations in and out, FLOPs."""
    n, k, m = points.T
    return np.stack((np.ones(len(points)), n * k, m * (n + k), m * n * k), axis=1)


def experts_grid(tables: Tables, experts: Experts, hidden: int, tp: int, ep: int, dtype: str, skew: float) -> Grid:
    """The routed experts of a layer, each divided over ``tp`` GPUs or all of them spread over ``ep``, held in a dtype, at a
    ``skew`` of :data:`LOADS`: (tokens of all GPUs, distinct experts). Raises :class:`NotMeasured`."""
    columns = tables.table("moe")
    of = rows_where(
        columns,
        moe_dtype=dtype,
        distribution=LOADS[skew],
        hidden_size=experts.latent or hidden,
        inter_size=experts.width,
        topk=experts.per_token,
        num_experts=experts.count,
    )
    parts, other = ("moe_tp_size", "moe_ep_size") if ep == 1 else ("moe_ep_size", "moe_tp_size")
    of &= columns[other] == 1
    have, over = columns[parts], max(tp, ep)
    if over not in have[of]:
        raise NotMeasured(f"{tables}: moe: no rows for {experts.described}, tp {tp}, ep {ep}, {LOADS[skew]}")
    if slower_than_16_bits(tables, dtype):
        raise NotMeasured(f"{tables}: moe: experts in {dtype} took longer than in bf16")
    of &= np.isin(have, beside(np.unique(have[of]), over))

    def terms(points: np.ndarray) -> np.ndarray:
        """A launch, the experts that are chosen, tokens: whole, and on each of the GPUs."""
        tokens, gpus = points.T
        chosen = [_chosen(experts, max(round(count), 1), skew) for count in tokens]
        return np.column_stack((np.ones(len(points)), np.array(chosen) / gpus, tokens, tokens / gpus))

    where = np.stack((columns["num_tokens"][of], have[of]), axis=1)
    fitted = Shape(*shortest(where, columns["latency"][of] * MILLISECOND), terms)
    every = np.unique(columns["num_tokens"])
    tokens = np.union1d(every, between(every))
    seconds = fitted.seconds([tokens, np.array([float(over)])])[:, 0]
    # How many experts the tokens use was part of the measurement: the same time at any count.
    return Grid((tokens.tolist(), [0.0, float(experts.count)]), np.repeat(seconds[:, None], 2, axis=1))


def _chosen(experts: Experts, tokens: int, skew: float) -> float:
    """Experts that have tokens; without skew as many as can."""
    if not skew:
        return min(experts.count, tokens * experts.per_token)
    return distinct_experts(experts.count, experts.per_token, tokens, skew)


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
    every = np.unique(columns["message_size"]) * ELEMENT_BYTES
    shape = Shape(sizes[:, None], seconds, lambda points: np.column_stack((np.ones(len(points)), points[:, 0])))
    return Grid((every,), shape.seconds([every]))
