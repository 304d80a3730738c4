"""A calibration's measurements on a lent GPU, where `workbench calibrate` itself cannot run: it needs more than torch.

They are left in the folder of which `workbench calibrate --from FOLDER` makes costs or a profile anywhere.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from backends.torch.backend import make_backend
from backends.torch.operator_times import timed_steps
from benchmarks.gpu_run import Run
from benchmarks.offline import make_options
from benchmarks.open_loop import Arrival, replay
from workbench.calibrate.operators import shape_file, shapes, time_shape, write_shape
from workbench.calibrate.points import (
    LOOPS,
    Point,
    Watched,
    conditions,
    design,
    keep_conditions,
    point_file,
    write_point,
)

MODEL = "Qwen/Qwen3-0.6B"
"""What the shape is called in the catalogue of models."""
MOST_RUNNING = 256
POINTS_S = 20.0
"""Kept for the points, without which operators make no profile."""
REPEATS = 8
"""Of a step whose operators are timed. Such a step takes about 20 ms, most of it launches: 212 shapes 45 s, by estimate."""


def calibrate(run: Run, model: Path, device: str, log: Any) -> None:
    """Time the operators of a runner of this model, then measure its points, as many as there is time for: a profile needs
    all of the former."""
    longest, running = (96, 4) if run.quick else (4200, MOST_RUNNING)
    backend = make_backend(make_options(model, run.device, [[0] * longest], [24]), log)
    watched = Watched(backend.workers)
    folder = run.out / "calibration.points"
    shutil.rmtree(folder, ignore_errors=True)
    keep_conditions(
        folder,
        conditions(
            device,
            model=MODEL,
            dtype="bf16" if run.device == "cuda" else "fp32",
            tp=1,
            kv_tokens=backend.kv_tokens,
            max_context=backend.max_context,
            page_size=1,
            max_running=running,
            cuda_graphs=run.device == "cuda",
        ),
    )
    timed, operators_s = _operators(run, backend, folder, running)
    backend.workers = watched  # type: ignore[assignment]
    points = [
        (loop, point) for point in design(backend.max_context, backend.kv_tokens, running, 8192) for loop in LOOPS
    ]
    # Odd strides: of both loops, and of all kinds wherever the time ends.
    strides = range(1 if run.quick else 7)
    points = [point for first in strides for point in points[first :: len(points) // 8 | 1 if run.quick else 7]]
    began, done = time.monotonic(), 0
    for number, (loop, point) in enumerate(points):
        if not run.quick and run.left() < 3:
            run.skip(f"calibration: {len(points) - number} of {len(points)} points", "the time is up")
            break
        for _ in range(2 if number == 0 else 1):  # the first one warms up
            watched.steps.clear()
            log.fresh()
            replayed = replay(
                backend,
                loop,
                _arrivals(point),
                max_running=running,
                concurrency=point.concurrency,
                batching=point.batching,
            )
        finish_s = np.array([row.finish_s for row in replayed.rows])
        requests = {"finish_s": finish_s, "instance": np.zeros(len(finish_s), np.int64)}
        write_point(point_file(folder, point, loop), point, loop, log.table.columns(), requests, watched)
        done += 1
    seconds = time.monotonic() - began
    run.write(
        "calibration",
        {"points": done, "of": len(points), "seconds": seconds, "steps_by_operator": timed, "operators_s": operators_s},
    )
    run.row(
        f"calibration: {timed} steps by operator in {operators_s:.0f} s, {done} of {len(points)} points in {seconds:.0f} s; "
        f"go on with workbench calibrate --from {folder}"
    )
    backend.close()


def _operators(run: Run, backend: Any, folder: Path, running: int) -> tuple[int, float]:
    """(steps whose operators were timed, seconds it took)."""
    runner = backend.workers.runner
    designed = shapes(backend.max_context, backend.kv_tokens, running, 8192, runner.page_size)
    if run.quick:
        designed = [shape for shape in designed if shape.tokens <= 64]
    # All kinds of them, wherever the time ends.
    designed = [shape for first in range(5) for shape in designed[first::5]]
    began = time.monotonic()
    for number, shape in enumerate(designed):
        if not run.quick and run.left() < POINTS_S:
            run.skip(f"operators: {len(designed) - number} of {len(designed)} steps", "the time is up")
            return number, time.monotonic() - began
        with timed_steps(runner) as timed:
            seconds = time_shape(timed, shape, runner.page_size, runner.config.vocab, REPEATS)
            write_shape(shape_file(folder, shape, 0), shape, seconds)
    return len(designed), time.monotonic() - began


def _arrivals(point: Point) -> list[Arrival]:
    """A point's requests; prompts share nothing but the part that the point says."""
    draw = random.Random(point.name)

    def tokens(count: int) -> list[int]:
        return [draw.randint(3, 10_000) for _ in range(count)]

    shared = tokens(point.shared)
    before = [Arrival("before", 0.0, shared, 1)] if shared else []
    return before + [
        Arrival(f"{point.name}.{i}", 0.0, shared + tokens(point.prompt - point.shared), point.output_of(i))
        for i in range(point.requests)
    ]
