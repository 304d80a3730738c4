"""Why predictions of published rows are off: the same rows with one cause taken away at a time, and rows that say themselves
that they were measured otherwise.

A row is impossible where its TPOT is below the step of its requests at the peaks of the GPU's datasheet, every operator at
its full rate and nothing lost between. Fewer ran than asked for where, by Little's law, the time of a request in decoding,
as a share of its whole time, leaves less than four fifths of the row's requests decoding: the rest waited to be admitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU, load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.host import FREE_HOST
from benchmarks.board.predict import Predicted, predict, settings_of
from benchmarks.board.results import Outcome
from benchmarks.board.silicon import Row
from benchmarks.profile_lookup import batch
from workbench.cluster import resolve

GPUS = ("h100_sxm", "h200_sxm", "b200_sxm")
ENGINES = ("vllm", "sglang")
RUNNING = 0.8
"""Share of the requests asked for, below which fewer ran."""


def is_asked(row: Row) -> bool:
    """Whether a row is of the engines and GPUs that are asked about, and scores."""
    return row.scores and row.engine in ENGINES and row.system in GPUS


def running(row: Row) -> float:
    """How many of a row's requests decoded at a time on average, by its own measurements (Little, 1961)."""
    decoding = row.tpot_s * row.output_tokens * (1 + row.shortest) / 2
    return row.concurrency * decoding / (decoding + row.ttft_s)


def fewer_ran(row: Row) -> bool:
    """Whether the engine ran fewer requests at a time than were asked for. Short answers to long prompts are always in
    prefill for some of the time."""
    return running(row) < RUNNING * row.concurrency and row.ttft_s > row.tpot_s * row.output_tokens / 2


def least_tpot_s(row: Row) -> float:
    """Seconds of a decode step of a row's requests that no GPU of the kind can go below."""
    settings = settings_of(row)
    model = load_model(settings["model"])
    weights = model.precision(settings["dtype"])
    gpu = _at_its_peaks(load_gpu(settings["gpu"]))
    cost = RooflineCost(model, gpu, dtype=weights, tp=row.tp, ep=settings.get("ep", 1), capture_sizes=[])
    count = max(round(running(row) / row.dp), 1)
    context = row.input_tokens * (1 + row.shortest) / 2 + row.output_tokens * (1 + row.shortest) / 4
    step = batch(np.full(count, round(context), np.int64))
    return cost.group_forward([step] * row.dp) if row.dp > 1 else cost.forward(step)


def _at_its_peaks(gpu: GPU) -> GPU:
    changed: dict[str, float] = {}
    for field in dataclasses.fields(GPU):
        if field.name.endswith("_efficiency"):
            changed[field.name] = 1.0
        elif field.name.endswith(("_overhead_s", "_depth_s", "_latency_s", "_gap_s")):
            changed[field.name] = 0.0
    return dataclasses.replace(gpu, **changed)  # type: ignore[arg-type]


@contextmanager
def _free_host() -> Iterator[None]:
    """Simulations whose CPU phases take no time."""
    usual = resolve.HostModel
    resolve.HostModel = lambda **_: FREE_HOST  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        resolve.HostModel = usual  # type: ignore[misc]


def _without_host(row: Row) -> Predicted:
    with _free_host():
        return predict(row, cost="measured")


FREE_LINK = {"link": "1e6GB/s", "link_latency": "0s"}
AS_RAN = "look-ups, as many at a time as ran"
"""The cause that is asked of the rows alone in which fewer ran."""
CAUSES: dict[str, Callable[[Row], Predicted]] = {
    "roofline": lambda row: predict(row, cost="roofline"),
    "roofline, links that take no time": lambda row: predict(row, cost="roofline", **FREE_LINK),
    "look-ups": lambda row: predict(row, cost="measured"),
    "look-ups, CPU and GPU in turn (`--loop normal`)": lambda row: predict(row, cost="measured", loop="normal"),
    "look-ups, a CPU that takes no time": _without_host,
    AS_RAN: lambda row: predict(row, cost="measured", max_running=max(round(running(row) / row.dp), 1)),
}
"""Predictions of a row with a cause taken away, by what is said of it."""


def outcome(row: Row, cause: str) -> Outcome:
    """A prediction, or why there is none."""
    try:
        return CAUSES[cause](row)
    except ValueError as error:
        return f"{row.engine}: {str(error).split(';')[0]}"
