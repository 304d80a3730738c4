"""The points of a calibration: a designed set of small workloads, and what each of them left behind.

A point is a workload that brings one shape of batch about: so many decodes over so long a context, a prompt so long, a
prompt over a cached prefix, prompts beside decodes. What a point measured is a file of its own, in a folder that says under
which conditions. Nothing here runs a point: ``measure.py`` does, and ``benchmarks/gpu.py`` where little is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.simulated.catalogue.gpu_specs import gpu_names, same_gpu
from backends.simulated.cost.models.fitted import LEAST_STEPS, fit_steps
from backends.simulated.cost.tables.fitted_file import read_fitted, write_fitted
from backends.simulated.host_fit import fit_host
from ground.json_file import json_line, read_json, write_json
from ground.whole_file import write_whole
from reports.record.errors import RecordError
from workbench.calibrate.fit import host_columns
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.config import Batching

if TYPE_CHECKING:
    from backends.torch.workers import Result, Workers

DECODES = 24
"""Decode steps of a point."""
MOST_PROMPT_TOKENS = 1 << 17
"""Of all requests of a point: on a GPU with room for more it would take longer than it tells."""
LOOPS = ("normal", "overlap")
"""Both: while a step runs, the CPU phases beside it slow it down, and it them, on a machine of few cores."""
COLUMNS = (
    "prefill_tokens",
    "decode_tokens",
    "context_tokens",
    "requests",
    "receive_s",
    "schedule_s",
    "launch_host_s",
    "process_s",
)
CONDITIONS_FILE = "conditions.json"


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
    batching: Batching = "prefill-first"

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.kind}-{self.requests}x{self.prompt}" + (f"-over{self.shared}" if self.shared else "")

    def output_of(self, number: int) -> int:
        """Tokens that request ``number`` writes."""
        return self.output + self.stagger * (number % max(self.concurrency or 1, 1))


def design(max_context: int, kv_tokens: int, max_running: int, largest_step: int) -> list[Point]:
    """The points for a runner of these bounds."""
    longest = min(max_context, kv_tokens) - DECODES - 4
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_running]
    contexts = [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= longest]
    points = [
        Point("decode", requests, prompt, DECODES)
        for prompt in contexts
        for requests in sizes
        if requests * (prompt + DECODES + 2) <= kv_tokens and requests * prompt <= MOST_PROMPT_TOKENS
    ]
    prompts = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= min(longest, largest_step)]
    points += [Point("prefill", 6, prompt, 2, concurrency=1) for prompt in prompts]
    points += [
        Point("cached", 6, cached + new, 2, shared=cached, concurrency=1)
        for cached in contexts[1:]
        for new in (16, 128, 1024)
        if cached + new <= longest
    ]
    # Prompts that join while others decode: between their steps, and in one step with them.
    joining: tuple[tuple[str, Batching], ...] = (("churn", "prefill-first"), ("mixed", "mixed"))
    for kind, batching in joining:
        points += [
            Point(kind, 4 * requests, prompt, DECODES // 2, stagger=1, concurrency=requests, batching=batching)
            for prompt in contexts[:3]
            for requests in sizes[1:5]
            if requests * (prompt + 2 * DECODES) <= kv_tokens
        ]
    return points


# -- one point -----------------------------------------------------------------------------------------------------------


class Watched:
    """Workers that note of every batch what a record does not say: query-key pairs of prompts, context of decodes."""

    def __init__(self, inner: Workers) -> None:
        self.inner = inner
        self.steps: dict[int, tuple[float, float]] = {}

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        pairs, prompts = 0.0, batch.num_prefill
        if prompts:
            lens, new = batch.seq_lens[:prompts], batch.query_lens[:prompts]
            pairs = float((new * (lens - new / 2)).sum())
        self.steps[batch.step] = pairs, float(batch.seq_lens[prompts:].sum())
        return self.inner.submit(batch)

    def close(self) -> None:
        self.inner.close()


def point_file(folder: Path, point: Point, loop: str) -> Path:
    """Return where a point's measurement is kept."""
    return folder / f"{point.name}.{loop}.json"


def write_point(
    file: Path,
    point: Point,
    loop: str,
    iterations: Mapping[str, np.ndarray],
    requests: Mapping[str, Any],
    watched: Watched,
) -> None:
    """Keep the steps of a workload that has run: columns of iterations.csv and requests.csv, and what was watched."""
    columns, ended = host_columns(iterations, requests)
    steps: dict[str, Any] = {name: columns[name].tolist() for name in COLUMNS}
    steps["seconds"] = (columns["end_s"] - columns["start_s"]).round(9).tolist()
    steps["ended"] = ended.tolist()
    exact = np.array([watched.steps[step] for step in columns["iteration"].tolist()]).reshape(-1, 2)
    steps["pairs"], steps["decode_context"] = exact[:, 0].tolist(), exact[:, 1].tolist()
    kept = {"point": point.name, "loop": loop, "measured_unix_s": round(time.time()), "steps": steps}
    write_whole(file, json_line(kept), RecordError)


# -- a folder of them ----------------------------------------------------------------------------------------------------


def conditions(device: str, **said: Any) -> dict[str, Any]:
    """Return what points were measured under: the device's name, versions, and what is ``said`` (model, dtype, limits)."""
    known = [name for name in gpu_names() if same_gpu(device, name)]
    # A script that is not installed, on a machine lent for it, has no version.
    packages = [name for name in ("llm-workbench", "numpy", "torch") if _version(name)]
    return {
        "device": device,
        "gpu": "cpu" if device.startswith("cpu ") else (known or [device])[0],
        **said,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_conditions(folder: Path, measured: dict[str, Any]) -> None:
    """Note the conditions in a new folder. Raises RecordError when it was measured under others."""
    file = folder / CONDITIONS_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, measured, RecordError)
        return
    before = read_json(file, RecordError)
    for name, value in measured.items():
        if before.get(name) != value:
            raise RecordError(
                f"{folder}: measured with {name} {before.get(name)!r}, now it is {value!r}; "
                "--force measures everything anew"
            )


def read_conditions(folder: Path) -> dict[str, Any]:
    """Return what the points of a folder were measured under. Raises RecordError."""
    measured = read_json(folder / CONDITIONS_FILE, RecordError)
    for name in ("model", "gpu", "dtype", "tp"):
        if name not in measured:
            raise RecordError(f"{folder / CONDITIONS_FILE}: {name}: missing")
    return measured


def is_points(folder: Path) -> bool:
    """Tell whether a folder holds measured points."""
    return (folder / CONDITIONS_FILE).is_file()


def fit_points(folder: Path, out: Path) -> dict[str, Any]:
    """Fit the points of a folder, write ``out``, and return what was written.

    Raises RecordError for a file that cannot be read, and for too few steps.
    """
    measured = read_conditions(folder)
    steps = read_steps(folder)
    fit = fit_steps(
        steps["prefill_tokens"],
        steps["decode_tokens"],
        steps["context_tokens"],
        steps["requests"] - steps["decode_tokens"],
        steps["seconds"],
        steps["pairs"],
        steps["decode_context"],
    )
    host, errors = fit_host(steps, steps["ended"])
    write_fitted(
        out,
        [fit],
        host,
        model=measured["model"],
        gpu=measured["gpu"],
        dtype=measured["dtype"],
        tp=measured["tp"],
        source=f"{len(_point_files(folder))} measured points in {folder.name}",
        host_errors=errors,
        measured=measured,
    )
    return read_fitted(out)


def read_steps(folder: Path) -> dict[str, np.ndarray]:
    """The steps of all points of a folder, those left out where something else had the machine: :data:`COLUMNS`,
    ``seconds``, ``ended`` (requests that ended with it), ``pairs`` and ``decode_context`` (see :class:`Watched`).

    Raises RecordError for a file that cannot be read, and for too few steps.
    """
    points = [_read_steps(file) for file in _point_files(folder)]
    count = sum(len(steps["seconds"]) for steps in points)
    if count < LEAST_STEPS:
        raise RecordError(f"{folder}: {count} steps are too few; {LEAST_STEPS} are needed")
    usable = np.concatenate([_usable(steps) for steps in points])
    return {name: np.concatenate([of[name] for of in points])[usable] for name in points[0]}


def _point_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.json") if file.name != CONDITIONS_FILE)


def _usable(steps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Choose the steps of a point to fit: none over three times the median of its like, where something else had the
    machine."""
    seconds = steps["seconds"]
    shapes = np.stack([steps[name] for name in ("prefill_tokens", "decode_tokens")], axis=1)
    _, which = np.unique(shapes, axis=0, return_inverse=True)
    medians = np.array([np.median(seconds[which == shape]) for shape in range(which.max(initial=-1) + 1)])
    return (seconds > 0) & (seconds < 3 * medians[which]) if len(seconds) else np.zeros(0, bool)


def _read_steps(file: Path) -> dict[str, np.ndarray]:
    steps: Any = read_json(file, RecordError).get("steps")
    names = (*COLUMNS, "seconds", "ended", "pairs", "decode_context")
    try:
        found = {name: np.array(steps[name], np.float64) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{file}: steps: not what a calibration writes ({type(error).__name__}: {error})") from None
    if len({len(values) for values in found.values()}) != 1:
        raise RecordError(f"{file}: steps: columns of different length")
    return found
