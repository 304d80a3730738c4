"""Calibration by measurement on the device at hand: the points of ``points.py`` through our own runner, and between them
its operators, in the steps of ``operators.py``.

Every point runs through the real loop, so the CPU phases are those of real steps. A calibration that was stopped goes on
where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.record.run_record import RunRecord
from traces import Trace, TraceRequest
from traces.files.source import Source
from traces.trace import TraceInfo
from workbench.calibrate.operator_profile import profiled_model, write_operators
from workbench.calibrate.operators import (
    VISITS,
    Shape,
    shape_file,
    shapes,
    time_shape,
    write_shape,
)
from workbench.calibrate.points import (
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
from workbench.cluster.device import DTYPE_NAMES, device_name, runner_options
from workbench.cluster.replay import replay_on
from workbench.scheduler.config import ConfigError
from workbench.settings.run_settings import RunSettings

if TYPE_CHECKING:
    from backends.torch.runner import ModelRunner

Progress = Callable[[int, int, str], None]
"""Called with points done, points in all, and the one that is next."""


def measure(
    settings: RunSettings, device: str, load_format: str, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure everything that is not measured yet, write ``out``, and return what was written: costs fitted to whole steps
    if ``out`` is a file (:func:`wants_file`), else a profile, for which operators are timed as well.

    What is measured is kept in ``out`` with ``.points`` behind it. KeyboardInterrupt leaves it for the next time.

    Raises RecordError for points measured under other conditions, ConfigError or what :func:`profiled_model` raises for
    what a profile cannot hold, and what loading a model raises.
    """
    from backends.torch.backend import make_backend

    options = runner_options(settings, "normal", device, load_format)
    if not wants_file(out):
        if settings.tp > 1:
            raise ConfigError(
                f"tp: operators are timed on one rank, not {settings.tp}; --out FILE.json fits whole steps"
            )
        profiled_model(settings.model)
    folder = points_folder(out)
    backend = make_backend(options, lambda row: None)
    try:
        watched = Watched(backend.workers)
        keep_conditions(
            folder,
            conditions(
                device_name(device),
                model=settings.model,
                dtype=DTYPE_NAMES[backend.workers.dtype],
                tp=settings.tp,
                kv_tokens=backend.kv_tokens,
                max_context=backend.max_context,
                page_size=settings.page_size,
                max_running=settings.max_running,
                cuda_graphs=settings.cuda_graphs,
            ),
        )
        backend.workers = watched  # type: ignore[assignment]
        bounds = backend.max_context, backend.kv_tokens, settings.max_running, options.step_tokens
        runs = _Runs(settings, device, backend, watched, options.step_tokens)
        tasks = [
            _Task(f"{point.name} {loop}", point_file(folder, point, loop), partial(runs.measure, point, loop))
            for point in design(*bounds)
            for loop in LOOPS
        ]
        if not wants_file(out):
            runner = watched.inner.runner  # type: ignore[attr-defined]
            tasks = _between(
                tasks,
                [
                    _Task(
                        f"operators {shape.name}", shape_file(folder, shape, visit), partial(_time_shape, shape, runner)
                    )
                    for visit in range(VISITS)
                    for shape in shapes(*bounds, settings.page_size)
                ],
            )
        for number, task in enumerate(tasks):
            if progress is not None:
                progress(number, len(tasks), task.name)
            if not task.file.exists():
                task.measure(task.file)
        if progress is not None:
            progress(len(tasks), len(tasks), "")
    finally:
        backend.close()
    return fit_points(folder, out) if wants_file(out) else write_operators(folder, out)


def wants_file(out: Path) -> bool:
    """Tell whether a calibration writes fitted costs, one JSON file, rather than a profile, a folder."""
    return out.suffix == ".json"


def points_folder(out: Path) -> Path:
    """Return where a calibration that writes ``out`` keeps what it has measured."""
    return out.with_name(out.name + ".points")


@dataclass(frozen=True)
class _Task:
    """Something to measure into a file."""

    name: str
    file: Path
    measure: Callable[[Path], None]


def _between(tasks: list[_Task], others: list[_Task]) -> list[_Task]:
    """Both lists in one, evenly mixed: a machine whose speed changes from minute to minute changes both alike."""
    places = [((number + 0.5) / len(all_), task) for all_ in (tasks, others) for number, task in enumerate(all_)]
    return [task for _, task in sorted(places, key=lambda at: at[0])]


def _time_shape(shape: Shape, runner: ModelRunner, file: Path) -> None:
    from backends.torch.operator_times import timed_steps

    with timed_steps(runner) as run:
        write_shape(file, shape, time_shape(run, shape, runner.page_size, runner.config.vocab))


@dataclass
class _Runs:
    """Runs workloads on a backend, in this process."""

    settings: RunSettings
    device: str
    backend: Any
    watched: Watched
    step_tokens: int
    warm: bool = False

    def measure(self, point: Point, loop: str, file: Path) -> None:
        """Run a workload and keep its steps."""
        run = partial(_run_point, point, self.settings, loop, self.device, self.backend, self.watched, self.step_tokens)
        if not self.warm:
            run()  # the first steps of a process pay for what is made once
            self.warm = True
        record = run()
        write_point(file, point, loop, record.iterations, record.requests, self.watched)


def _run_point(
    point: Point, settings: RunSettings, loop: str, device: str, backend: Any, watched: Watched, step_tokens: int
) -> RunRecord:
    """Run a workload once."""
    chosen = dataclasses.replace(
        settings,
        concurrency=point.concurrency,
        loop=loop,
        ignore_eos=False,
        requests=None,
        batching=point.batching,
        max_batch_tokens=min(settings.max_batch_tokens, step_tokens),
    )
    watched.steps.clear()
    record = replay_on(backend, chosen, loop, _trace(point), "", "calibrate", device)
    if record.meta["interrupted"]:
        raise KeyboardInterrupt
    return record


def _trace(point: Point) -> Trace:
    """A point as a trace in memory."""
    from traces.requests.content import Synthetic

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
