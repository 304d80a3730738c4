"""The kinds of collectives that are fitted: NCCL's ring, all-reduces in kernels over peers' memory, and over nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.collective_kernels import FAR_GPUS, Ring, Shots, far_all_reduce_s, takes_shots
from backends.simulated.cost.tables.table_kinds import ELEMENT_BYTES
from benchmarks.board.operator_fit import Fit, Model, fit
from benchmarks.board.table_rows import ENGINES, Measured, Tables

RING, SHOTS = "collectives through NCCL's ring", "all-reduces in engines' kernels"
FAR = "all-reduces over nodes that NVLink joins"
GRAPH = "_graph"
"""End of the names of kernels that a captured graph replayed."""
MOST_BYTES = 2**28
"""Messages beyond these are longer than any step's."""
SIZES = ["num_gpus", "message_size"]
RING_START = {
    "ring_efficiency": 0.6,
    "ring4_efficiency": 0.6,
    "ring8_efficiency": 0.6,
    "ring_small_efficiency": 0.5,
    "ring_overhead_s": 5e-6,
    "ring_large_overhead_s": 20e-6,
    "ring_hop_overhead_s": 1e-6,
}
SHOTS_START = {
    "pair_efficiency": 0.6,
    "one_shot_efficiency": 0.6,
    "two_shot_efficiency": 0.6,
    "one_shot_overhead_s": 4e-6,
    "two_shot_overhead_s": 9e-6,
    "peer_overhead_s": 0.1e-6,
}
THRESHOLDS = {
    "one_shot_most_bytes": [2.0**power for power in range(17, 22)],
    "shots_most_bytes": [2.0**power for power in range(20, 32)],
}
"""Sizes between which engines may choose another kernel."""


def ring(tables: Tables, gpu: GPU) -> Fit | None:
    """All-gathers, reduce-scatters and all-reduces of NCCL, which are no engine's own, and those all-reduces of engines that
    go through its ring whatever their size."""
    if tables.engine is not None:
        return None
    found = [_of_nccl(tables, gpu)]
    engines = _of_engines(tables, gpu)
    if engines is not None:
        rows = engines.rows[~takes(engines, gpu)]
        found.append(rows.assign(hops=2 * (rows.num_gpus - 1)))
    found = [each for each in found if each is not None and len(each)]
    if not found:
        return None
    together = pd.concat(found)
    rows = Measured(together.assign(through=together.hops / together.num_gpus * together.message_size * ELEMENT_BYTES))
    start = gpu if gpu.ring_efficiency else replace(gpu, **RING_START)
    names = [name for name in RING_START if name != "ring8_efficiency" or rows.num_gpus.max() > 4]

    def model(at: Measured) -> Model:
        def seconds(*values: float) -> np.ndarray:
            found: np.ndarray = Ring.of(_with(start, names, values)).seconds(at.through, at.hops, at.num_gpus)
            return found

        return seconds

    return fit(RING, rows, names, start, model)


def shots(tables: Tables, gpu: GPU) -> Fit | None:
    """All-reduces of engines that take kernels over peers' memory, up to a size at which the ring takes their place."""
    rows = _of_engines(tables, gpu)
    if rows is None or not gpu.ring_efficiency:
        return None
    rows = rows.part(takes(rows, gpu))
    start = gpu if gpu.pair_efficiency else replace(gpu, **SHOTS_START, shots_most_bytes=2.0**24)
    pairs = ["pair_efficiency", "one_shot_overhead_s", "shots_most_bytes"]
    names = pairs if (rows.num_gpus == 2).all() else [*SHOTS_START, *THRESHOLDS]

    def model(at: Measured) -> Model:
        message, gpus = at.message_size * ELEMENT_BYTES, at.num_gpus
        ring_s = Ring.of(gpu).seconds(2 * (gpus - 1) / gpus * message, 2 * (gpus - 1), gpus)

        def seconds(*values: float) -> np.ndarray:
            tried = _with(start, names, values)
            return np.where(message < tried.shots_most_bytes, Shots.of(tried).seconds(message, gpus), ring_s)

        return seconds

    return fit(SHOTS, rows, names, start, model, THRESHOLDS)


def far(tables: Tables, gpu: GPU) -> Fit | None:
    """All-reduces of engines over several nodes that NVLink joins."""
    rows = tables.rows(
        "custom_allreduce",
        lambda t: (
            t.kernel_source.str.endswith(GRAPH)
            & t.num_gpus.gt(gpu.gpus_per_node)
            & t.num_gpus.le(FAR_GPUS)
            & (t.message_size * ELEMENT_BYTES).le(MOST_BYTES)
        ),
        SIZES,
    )
    if rows is None:
        return None
    names = ["far_efficiency", "far_overhead_s"]
    start = gpu if gpu.far_efficiency else replace(gpu, far_efficiency=0.6, far_overhead_s=20e-6)

    def model(at: Measured) -> Model:
        def seconds(*values: float) -> np.ndarray:
            found: np.ndarray = far_all_reduce_s(
                at.message_size * ELEMENT_BYTES, at.num_gpus, _with(start, names, values)
            )
            return found

        return seconds

    return fit(FAR, rows, names, start, model)


def takes(rows: Measured, gpu: GPU) -> np.ndarray:
    """Which rows engines take kernels over peers' memory for, bool[rows]."""
    return np.array([takes_shots(int(gpus), gpu) for gpus in rows.num_gpus], bool)


def _of_engines(tables: Tables, gpu: GPU) -> Measured | None:
    return tables.rows(
        "custom_allreduce",
        lambda t: t.kernel_source.str.endswith(GRAPH) & _fits(t, gpu),
        SIZES,
    )


def _of_nccl(tables: Tables, gpu: GPU) -> pd.DataFrame | None:
    rows = tables.rows(
        "nccl",
        lambda t: t.nccl_dtype.eq("half") & ~t.op_name.eq("alltoall") & _fits(t, gpu),
        ["op_name", *SIZES],
        ENGINES[:1],  # the same for all
    )
    if rows is None:
        return None
    rounds = np.where(rows.rows.op_name.eq("all_reduce"), 2, 1)
    return rows.rows.assign(engine="nccl", hops=rounds * (rows.rows.num_gpus - 1))


def _fits(table: pd.DataFrame, gpu: GPU) -> pd.Series:
    return table.num_gpus.le(gpu.gpus_per_node) & (table.message_size * ELEMENT_BYTES).le(MOST_BYTES)


def _with(gpu: GPU, names: list[str], values: tuple[float, ...]) -> GPU:
    """The GPU with these numbers."""
    return replace(gpu, **dict(zip(names, values, strict=True)))
