"""Calibration by measurement: our own runner, on the device at hand, over a designed set of batches.

A point is a small workload that brings one shape of batch about: so many decodes over so long a context, a prompt so long, a
prompt over a cached prefix, prompts beside decodes. It runs through the real loop, so the CPU phases are those of real
steps. What a point measured is kept in a file of its own: a calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.simulated.calibrate import fit_host
from backends.simulated.cost.build import same_gpu
from backends.simulated.cost.fitted import LEAST_STEPS, fit_steps, read_fitted, write_fitted
from backends.simulated.hardware import gpu_names
from reports.errors import RecordError
from traces import Trace, TraceRequest
from traces.files import Source
from traces.trace import TraceInfo
from workbench.run.calibrate import host_columns
from workbench.run.real import DTYPE_NAMES, device_name, runner_options
from workbench.run.replay import replay_on
from workbench.run.settings import RunSettings
from workbench.scheduler.batch import ModelWorkerBatch

if TYPE_CHECKING:
    from backends.torch.workers import StepOutput, Workers

DECODES = 24
"""Decode steps of a point."""
LOOPS = ("normal", "overlap")
"""Both: while a step runs, the CPU phases beside it slow it down, and it them, on a machine of few cores."""
COLUMNS = ("prefill_tokens", "decode_tokens", "context_tokens", "requests", "receive_s", "schedule_s", "launch_host_s",
           "process_s")  # fmt: skip
Progress = Callable[[int, int, str], None]
"""Called with points done, points in all, and the one that is next."""


@dataclass(frozen=True)
class Point:
    """One workload: ``requests`` prompts of ``prompt`` tokens; their first ``shared`` are those of a request before."""

    kind: str
    requests: int
    prompt: int
    output: int
    shared: int = 0
    stagger: int = 0
    """Output tokens that each request has more than the one before: then prompts join while others decode."""
    concurrency: int | None = None

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.kind}-{self.requests}x{self.prompt}" + (f"-over{self.shared}" if self.shared else "")


def design(max_context: int, kv_tokens: int, max_running: int, largest_step: int) -> list[Point]:
    """The points for a runner of these bounds."""
    longest = min(max_context, kv_tokens) - DECODES - 4
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_running]
    contexts = [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= longest]
    points = [
        Point("decode", requests, prompt, DECODES)
        for prompt in contexts
        for requests in sizes
        if requests * (prompt + DECODES + 2) <= kv_tokens
    ]
    prompts = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= min(longest, largest_step)]
    points += [Point("prefill", 6, prompt, 2, concurrency=1) for prompt in prompts]
    points += [
        Point("cached", 6, cached + new, 2, shared=cached, concurrency=1)
        for cached in contexts[1:]
        for new in (16, 128, 1024)
        if cached + new <= longest
    ]
    points += [
        Point("churn", 4 * requests, prompt, DECODES // 2, stagger=1, concurrency=requests)
        for prompt in contexts[:3]
        for requests in sizes[1:5]
        if requests * (prompt + 2 * DECODES) <= kv_tokens
    ]
    return points


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
        watched = _Watched(backend.workers)
        backend.workers = watched  # type: ignore[assignment]
        measured = _conditions(settings, device, backend.kv_tokens, backend.max_context, watched)
        _same_conditions(folder, measured)
        points = [
            (loop, point)
            for point in design(backend.max_context, backend.kv_tokens, settings.max_running, options.step_tokens)
            for loop in LOOPS
        ]
        warm = False
        for number, (loop, point) in enumerate(points):
            file = folder / f"{point.name}.{loop}.json"
            if progress is not None:
                progress(number, len(points), f"{point.name} {loop}")
            if file.exists():
                continue
            run = partial(_run_point, point, settings, loop, device, backend, watched)
            if not warm:
                run()  # the first steps of a process pay for what is made once
                warm = True
            _write_json(file, run())
        if progress is not None:
            progress(len(points), len(points), "")
    finally:
        backend.close()
    files = [folder / f"{point.name}.{loop}.json" for loop, point in points]
    return _fit([json.loads(file.read_bytes()) for file in files], settings, measured, folder, out)


def _conditions(settings: RunSettings, device: str, kv_tokens: int, max_context: int, workers: Any) -> dict[str, Any]:
    named = device_name(device)
    known = [name for name in gpu_names() if same_gpu(named, name)]
    return {
        "model": settings.model, "device": named, "gpu": "cpu" if device == "cpu" else (known or [named])[0],
        "dtype": DTYPE_NAMES[workers.inner.dtype], "tp": settings.tp, "kv_tokens": kv_tokens, "max_context": max_context,
        "page_size": settings.page_size, "max_running": settings.max_running, "cuda_graphs": settings.cuda_graphs,
        "threads": os.environ.get("OMP_NUM_THREADS", ""), "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("llm-workbench", "numpy", "torch")},
    }  # fmt: skip


def _same_conditions(folder: Path, measured: dict[str, Any]) -> None:
    file = folder / "conditions.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, measured)
        return
    before = json.loads(file.read_bytes())
    for name, value in measured.items():
        if before.get(name) != value:
            raise RecordError(
                f"{folder}: measured with {name} {before.get(name)!r}, now it is {value!r}; "
                "--force measures everything anew"
            )


def _run_point(point: Point, settings: RunSettings, loop: str, device: str, backend: Any,
               watched: _Watched) -> dict[str, Any]:  # fmt: skip
    """The columns of the steps of one workload."""
    chosen = dataclasses.replace(settings, concurrency=point.concurrency, loop=loop, ignore_eos=False, requests=None)
    watched.steps.clear()
    record = replay_on(backend, chosen, loop, _trace(point), "", "calibrate", device)
    if record.meta["interrupted"]:
        raise KeyboardInterrupt
    columns, ended = host_columns(record)
    found: dict[str, Any] = {name: columns[name].tolist() for name in COLUMNS}
    found["seconds"] = (columns["end_s"] - columns["start_s"]).round(9).tolist()
    found["ended"] = ended.tolist()
    exact = np.array([watched.steps[step] for step in columns["iteration"].tolist()]).reshape(-1, 2)
    found["pairs"], found["decode_context"] = exact[:, 0].tolist(), exact[:, 1].tolist()
    return {"point": point.name, "loop": loop, "measured_unix_s": round(time.time()), "steps": found}


class _Watched:
    """Workers that note of every batch what a record does not say: query-key pairs of prompts, context of decodes."""

    def __init__(self, inner: Workers) -> None:
        self.inner = inner
        self.steps: dict[int, tuple[float, float]] = {}

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], StepOutput]:
        pairs, prompts = 0.0, batch.num_prefill
        if prompts:
            assert batch.extend_lens is not None
            lens = batch.seq_lens[:prompts]
            pairs = float((batch.extend_lens * (lens - batch.extend_lens / 2)).sum())
        self.steps[batch.step] = pairs, float(batch.seq_lens[prompts:].sum())
        return self.inner.submit(batch)

    def close(self) -> None:
        self.inner.close()


def _trace(point: Point) -> Trace:
    """A point as a trace in memory."""
    from traces.content import Synthetic

    def requests() -> Iterator[TraceRequest]:
        if point.shared:
            yield TraceRequest("before", 0.0, point.shared, 1, content=Synthetic(((0, "shared"),)))
        for number in range(point.requests):
            extra = point.stagger * (number % max(point.concurrency or 1, 1))
            request = TraceRequest(f"{point.name}.{number}", 0.0, point.prompt, point.output + extra)
            if point.shared:
                request.content = Synthetic(((0, "shared"), (point.shared, request.request_id)))
            yield request

    info = TraceInfo(point.name, "", "memory", lambda: False)
    return Trace(info, Source(Path(point.name)), requests)


def _fit(points: list[dict[str, Any]], settings: RunSettings, measured: dict[str, Any], source: Path,
         out: Path) -> dict[str, Any]:  # fmt: skip
    steps = {
        name: np.concatenate([np.array(point["steps"][name], np.float64) for point in points])
        for name in points[0]["steps"]
    }
    usable = _without_outliers(points)
    steps = {name: values[usable] for name, values in steps.items()}
    if len(steps["seconds"]) < LEAST_STEPS:
        raise RecordError(f"{source}: {len(steps['seconds'])} steps are too few; {LEAST_STEPS} are needed")
    fit = fit_steps(
        steps["prefill_tokens"], steps["decode_tokens"], steps["context_tokens"],
        steps["requests"] - steps["decode_tokens"], steps["seconds"], steps["pairs"], steps["decode_context"],
    )  # fmt: skip
    host, errors = fit_host(steps, steps["ended"])
    write_fitted(
        out, [fit], host, model=settings.model, gpu=measured["gpu"], dtype=measured["dtype"], tp=settings.tp,
        source=f"{len(points)} measured points in {source.name}", host_errors=errors, measured=measured,
    )  # fmt: skip
    return read_fitted(out)


def _without_outliers(points: list[dict[str, Any]]) -> np.ndarray:
    """Which steps to fit: not those that took over three times the median of their like in the same point, where something
    else had the machine."""
    keep = []
    for point in points:
        seconds = np.array(point["steps"]["seconds"])
        shapes = np.array([point["steps"][name] for name in ("prefill_tokens", "decode_tokens")]).T
        _, which = np.unique(shapes, axis=0, return_inverse=True)
        medians = np.array([np.median(seconds[which == shape]) for shape in range(which.max() + 1)])
        keep.append((seconds > 0) & (seconds < 3 * medians[which]))
    return np.concatenate(keep)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing: a file that is there is whole."""
    partial_file = file.with_name(f".{file.name}.partial")
    partial_file.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial_file, file)
