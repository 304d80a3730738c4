"""Calibration by measurement: the points of ``points.py`` through our own runner, on the device at hand.

Every point runs through the real loop, so the CPU phases are those of real steps. A calibration that was stopped goes on
where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from reports.record import RunRecord
from traces import Trace, TraceRequest
from traces.files import Source
from traces.trace import TraceInfo
from workbench.run.points import (
    LOOPS,
    Point,
    Watched,
    conditions,
    design,
    fit_points,
    keep_conditions,
    point_file,
    write_point,
)
from workbench.run.real import DTYPE_NAMES, device_name, runner_options
from workbench.run.replay import replay_on
from workbench.run.settings import RunSettings

Progress = Callable[[int, int, str], None]
"""Called with points done, points in all, and the one that is next."""


def measure(settings: RunSettings, device: str, load_format: str, out: Path,
            progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """Measure every point that is not measured yet, fit, write ``out``, and return what was written.

    What is measured is kept in ``out`` with ``.points`` behind it. KeyboardInterrupt leaves it for the next time.

    Raises RecordError for points measured under other conditions, and what loading a model raises.
    """
    from backends.torch.backend import make_backend

    options = runner_options(settings, "normal", device, load_format)
    folder = out.with_name(out.name + ".points")
    backend = make_backend(options, lambda *row: None)
    try:
        watched = Watched(backend.workers)
        keep_conditions(folder, conditions(
            device_name(device), model=settings.model, dtype=DTYPE_NAMES[backend.workers.dtype], tp=settings.tp,
            kv_tokens=backend.kv_tokens, max_context=backend.max_context, page_size=settings.page_size,
            max_running=settings.max_running, cuda_graphs=settings.cuda_graphs,
        ))  # fmt: skip
        backend.workers = watched  # type: ignore[assignment]
        points = [
            (loop, point)
            for point in design(backend.max_context, backend.kv_tokens, settings.max_running, options.step_tokens)
            for loop in LOOPS
        ]
        warm = False
        for number, (loop, point) in enumerate(points):
            file = point_file(folder, point, loop)
            if progress is not None:
                progress(number, len(points), f"{point.name} {loop}")
            if file.exists():
                continue
            run = partial(_run_point, point, settings, loop, device, backend, watched, options.step_tokens)
            if not warm:
                run()  # the first steps of a process pay for what is made once
                warm = True
            record = run()
            write_point(file, point, loop, record.iterations, record.requests, watched)
        if progress is not None:
            progress(len(points), len(points), "")
    finally:
        backend.close()
    return fit_points(folder, out)


def _run_point(point: Point, settings: RunSettings, loop: str, device: str, backend: Any, watched: Watched,
               step_tokens: int) -> RunRecord:  # fmt: skip
    """Run a workload once."""
    chosen = dataclasses.replace(
        settings, concurrency=point.concurrency, loop=loop, ignore_eos=False, requests=None, batching=point.batching,
        max_batch_tokens=min(settings.max_batch_tokens, step_tokens),
    )  # fmt: skip
    watched.steps.clear()
    record = replay_on(backend, chosen, loop, _trace(point), "", "calibrate", device)
    if record.meta["interrupted"]:
        raise KeyboardInterrupt
    return record


def _trace(point: Point) -> Trace:
    """A point as a trace in memory."""
    from traces.content import Synthetic

    def requests() -> Iterator[TraceRequest]:
        if point.shared:
            yield TraceRequest("before", 0.0, point.shared, 1, content=Synthetic(((0, "shared"),)))
        for number in range(point.requests):
            request = TraceRequest(f"{point.name}.{number}", 0.0, point.prompt, point.output_of(number))
            if point.shared:
                request.content = Synthetic(((0, "shared"), (point.shared, request.request_id)))
            yield request

    info = TraceInfo(point.name, "", "memory", lambda: False)
    return Trace(info, Source(Path(point.name)), requests)
