"""A profile of our own runner: its operators timed inside designed steps, and what real steps take beside them.

A shape is one step: prompt tokens over so many cached ones, and decodes at so long a context. What its operators took is a
file; the files of all shapes become the tables of a profile (docs/profiles.md). Nothing here runs a step: ``measure.py``
does, and ``benchmarks/gpu.py`` where little is installed.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.calibrate import fit_host
from backends.simulated.cost import own_profile
from backends.simulated.cost.least_squares import relative_least_squares
from backends.simulated.cost.profile import DENSE_ONLY, ProfileCost
from backends.simulated.cost.roofline import default_capture_sizes
from backends.simulated.cost.tables import ProfileError
from backends.simulated.hardware import load_gpu
from backends.simulated.models import ModelSpec, load_model
from reports.errors import RecordError
from reports.json_file import read_object
from workbench.run.points import read_conditions, read_steps, write_json
from workbench.scheduler.batch import ModelWorkerBatch, NewRequest, PageWrite
from workbench.scheduler.request import SamplingParams

FOLDER = "operators"
"""Of a folder of points: where the shapes are."""
ONCE, HEAD, ATTENTION, EXPERTS = ("embedding", "final_layernorm"), ("lm_head", "sampler"), "attention", "experts"
BESIDE = "beside"
"""What a step takes beside its operators."""
MOST_TOKENS = 1 << 17
"""Of the context of a step's decodes: with room for more it would take longer than it tells."""
LEAST_REPEATS, MOST_REPEATS, ENOUGH_S = 2, 40, 0.1
"""A shape runs until it has run so often, and then until it has taken so long or run that often."""
VISITS = 3
"""How often a shape is come back to: a machine may be slow for a second, or for a minute."""


@dataclass(frozen=True)
class Shape:
    """One step: ``prompts`` prompts of ``prompt`` tokens each, after ``cached`` ones, beside ``decodes`` of ``context``."""

    prompt: int = 0
    cached: int = 0
    decodes: int = 0
    context: int = 0
    prompts: int = 1

    @property
    def name(self) -> str:
        """A file's name."""
        prompts = f"{self.prompts}x{self.prompt}-over-{self.cached}" if self.prompt else ""
        decodes = f"{self.decodes}-decodes-at-{self.context}" if self.decodes else ""
        return "-beside-".join(part for part in (prompts, decodes) if part)

    @property
    def extends(self) -> list[int]:
        """New tokens of each prompt."""
        return [self.prompt] * self.prompts if self.prompt else []

    @property
    def lens(self) -> list[int]:
        """Tokens in the KV of each request after the step."""
        return [self.cached + new for new in self.extends] + [self.context] * self.decodes

    @property
    def tokens(self) -> int:
        """That are computed."""
        return sum(self.extends) + self.decodes


def shapes(max_context: int, kv_tokens: int, max_running: int, largest_step: int, page_size: int) -> list[Shape]:
    """The steps to time on a runner of these bounds."""
    longest = min(max_context, kv_tokens)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_running]
    contexts = [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= longest]
    totals = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= largest_step]
    lengths = [n for n in totals if n <= longest]
    found = [Shape(decodes=n, context=context) for context in contexts for n in sizes]
    found += [Shape(n, cached) for cached in (0, *contexts[1:]) for n in lengths]
    # Several prompts: fewer pairs than one of so many tokens has, and larger steps than one prompt can be.
    found += [
        Shape(total // n, prompts=n)
        for n in (2, 4, 16, max_running)
        for total in totals
        if lengths[0] <= total // n <= lengths[-1]
    ]
    beside = [(n, context) for n in (1, *sizes[2::2]) for context in contexts[::2]]
    found += [Shape(n, cached, *decodes) for n in lengths[::3] for cached in (0, contexts[-1]) for decodes in beside]
    found += [Shape(n, 0, *decodes, prompts=4) for n in lengths[::3] for decodes in beside]
    return [
        shape
        for shape in dict.fromkeys(found)
        if shape.prompt + shape.cached <= longest
        and shape.decodes * shape.context <= MOST_TOKENS
        and len(shape.lens) <= max_running
        and sum(_pages(shape, page_size)) <= kv_tokens // page_size
        and shape.tokens <= largest_step
    ]


def _pages(shape: Shape, page_size: int) -> list[int]:
    return [-(-length // page_size) for length in shape.lens]


def step_of(shape: Shape, page_size: int, vocab: int) -> ModelWorkerBatch:
    """The shape as a batch of requests that begin in it, decodes and their cached tokens included: nobody reads what is in
    their KV. The prompts' tokens are all kinds of tokens, or a router would send all of them to the same experts."""
    lens, extends = shape.lens, shape.extends
    prompts, new = len(extends), sum(extends)
    first = np.concatenate(([0], np.cumsum(_pages(shape, page_size))))
    params = SamplingParams(1, temperature=0.0)
    nothing = np.zeros(0, np.int32)
    return ModelWorkerBatch(
        0, "mixed" if prompts and shape.decodes else "prefill" if prompts else "decode", np.arange(len(lens)),
        np.array(lens), np.array(extends) if prompts else None, prompts, len(lens), new, shape.decodes, sum(lens),
        spread_ids(new, vocab) if prompts else None, None,
        tuple(NewRequest(row, str(row), length, nothing, params) for row, length in enumerate(lens)), None, None,
        tuple(PageWrite(row, 0, np.arange(*first[row : row + 2], dtype=np.int32)) for row in range(len(lens))),
        sum(lens), 0, len(lens),
    )  # fmt: skip


def spread_ids(count: int, vocab: int) -> np.ndarray:
    """int32[count], token ids from all over the vocabulary."""
    return (np.arange(count) * 7919 % vocab).astype(np.int32)


def time_shape(run: Callable[[ModelWorkerBatch, np.ndarray], dict[str, float]], shape: Shape, page_size: int,
               vocab: int) -> dict[str, float]:  # fmt: skip
    """Median seconds of each operator over repetitions of the step; the first one, which warms up, does not count.

    ``run(batch, known)`` runs a step whose decodes continue the tokens ``known``, int64[decodes].
    """
    batch, known = step_of(shape, page_size, vocab), spread_ids(shape.decodes, vocab).astype(np.int64)
    run(batch, known)
    again = batch._replace(new_requests=(), page_writes=())
    seen: dict[str, list[float]] = defaultdict(list)
    repeats, took_s = 0, 0.0
    while repeats < LEAST_REPEATS or (took_s < ENOUGH_S and repeats < MOST_REPEATS):
        for name, seconds in run(again, known).items():
            seen[name].append(seconds)
        repeats += 1
        took_s += seen["step"][-1]
    return {name: float(np.median(values)) for name, values in seen.items()}


def shape_file(folder: Path, shape: Shape, visit: int) -> Path:
    """Where a shape's measurement is kept in a folder of points."""
    return folder / FOLDER / f"{shape.name}.{visit}.json"


def write_shape(file: Path, shape: Shape, seconds: Mapping[str, float]) -> None:
    """Keep what a shape's operators took."""
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"shape": asdict(shape), "seconds": {name: round(value, 9) for name, value in seconds.items()}})


# -- from the files to a profile -----------------------------------------------------------------------------------------


def has_operators(folder: Path) -> bool:
    """Whether operators were timed in a folder of points."""
    return any((folder / FOLDER).glob("*.json"))


def profiled_model(name: str) -> ModelSpec:
    """The shape of a model that a profile can hold. Raises CatalogueError or ProfileError."""
    model = load_model(name)
    if any(window is not None for window in model.windows):
        raise ProfileError(
            f"{name}: attends over sliding windows, which no profile holds; --out FILE.json fits whole steps"
        )
    return model


def write_operators(folder: Path, out: Path) -> dict[str, Any]:
    """Make the profile ``out``, a folder, of a folder of points, and return what ``profile.json`` says.

    The operators were timed alone. What the points' real steps took on top is fitted to them (:class:`Beside`). All of
    ``out`` is written, or nothing.

    Raises RecordError for a file that cannot be read, and what :func:`profiled_model` raises.
    """
    measured = read_conditions(folder)
    if not has_operators(folder):
        raise RecordError(
            f"{folder / FOLDER}: no operators were timed; from the points alone, --out FILE.json can be had"
        )
    model = profiled_model(measured["model"])
    timed = [_read_shape(file) for file in sorted((folder / FOLDER).glob("*.json"))]
    tables = _tables(timed, model)
    steps = read_steps(folder)
    host, errors = fit_host(steps, steps["ended"])
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        meta = {name: measured[name] for name in ("model", "gpu", "dtype")}
        own_profile.write_profile(partial, measured["tp"], meta, tables)
        beside = _fit_beside(_bare_cost(partial, measured, model), steps)
        scaled = {
            name: [(*row[:-1], _rounded(row[-1] * beside.factor)) for row in rows] for name, rows in tables.items()
        }
        tokens = [row[1] for row in scaled["once"]]
        scaled["once"] += [(BESIDE, n, _rounded(beside.step_s)) for n in (min(tokens), max(tokens))]
        different = len({shape for shape, _ in timed})
        meta |= {
            "engine": "workbench", "host": {name: _rounded(value) for name, value in host.items()},
            "measured": f"{different} steps by operator and {len(steps['seconds']):,} in runs, in {folder.name}",
            "conditions": measured, "host_errors": {name: round(value, 6) for name, value in errors.items()},
            "operators": {"steps": different, **{name: _rounded(value) for name, value in asdict(beside).items()}},
        }  # fmt: skip
        own_profile.write_profile(partial, measured["tp"], meta, scaled)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return own_profile.read_meta(out)


def _read_shape(file: Path) -> tuple[Shape, dict[str, float]]:
    content = read_object(file)
    try:
        shape = Shape(**content["shape"])
        return shape, {str(name): float(value) for name, value in content["seconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{file}: not what a calibration writes ({type(error).__name__}: {error})") from None


def _tables(timed: Iterable[tuple[Shape, dict[str, float]]], model: ModelSpec) -> dict[str, list[tuple[Any, ...]]]:
    """Rows of a profile's tables. Where shapes agree in what an operator is looked up by, their median counts."""
    moe = sum(model.moe_layers)
    seen: dict[str, dict[tuple[Any, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for shape, seconds in timed:
        for name, value in seconds.items():
            if name == "step":
                continue
            if name == ATTENTION:
                key = sum(shape.extends), shape.cached, shape.decodes, shape.context, shape.prompts
                seen["attention"][key].append(value / model.layers)
            elif name == EXPERTS:
                chosen = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** shape.tokens)
                seen["experts"][shape.tokens, round(chosen, 6)].append(value / moe)
            elif name in HEAD:
                seen["head"][name, len(shape.lens)].append(value)
            elif name in ONCE:
                seen["once"][name, shape.tokens].append(value)
            else:
                dense = name.removeprefix(own_profile.STAIRCASE) in DENSE_ONLY
                seen["layer"][name, shape.tokens].append(value / (model.layers - moe if dense else model.layers))
    tables: dict[str, list[tuple[Any, ...]]] = {
        table: [(*key, _rounded(float(np.median(values)))) for key, values in sorted(rows.items())]
        for table, rows in seen.items()
    }
    return tables


def _bare_cost(profile: Path, measured: Mapping[str, Any], model: ModelSpec) -> ProfileCost:
    captured = (
        default_capture_sizes(measured["max_running"])
        if measured.get("cuda_graphs") and measured["gpu"] != "cpu"
        else ()
    )
    tables = own_profile.read(profile, measured["tp"], model)
    return ProfileCost(tables, model, load_gpu(measured["gpu"]), dtype=measured["dtype"], capture_sizes=captured)


@dataclass(frozen=True)
class Beside:
    """What real steps take: ``factor`` times their operators (two threads on few cores slow each other down), and ``step_s``
    on top."""

    factor: float
    step_s: float
    mean_error: float
    """Mean relative error of a step."""


def _fit_beside(cost: ProfileCost, steps: Mapping[str, np.ndarray]) -> Beside:
    """Neither is below zero, and relative errors are least. (With seconds a token and a sequence as well, these explain what
    scatters in the operators, and the factor falls below one.)"""
    seconds = steps["seconds"]
    by = ("prefill_tokens", "pairs", "requests", "decode_tokens", "decode_context")
    operators_s = [cost.forward(_average(*at)) for at in zip(*(steps[name].tolist() for name in by), strict=True)]
    rows = np.stack((np.array(operators_s), np.ones(len(seconds))), axis=1)
    factor, step_s = (found := relative_least_squares(rows, seconds)).tolist()
    return Beside(factor, step_s, float(np.abs(rows @ found / seconds - 1).mean()))


def _average(prompt_tokens: float, pairs: float, requests: float, decodes: float, decode_context: float) -> Any:
    """A step of which only sums are known, as a batch of equal prompts and equal decodes."""
    prompts, decodes = int(requests - decodes), int(decodes)
    each = prompt_tokens / prompts if prompts else 0.0
    length = pairs / prompt_tokens + each / 2 if prompts else 0.0
    lens = np.array([length] * prompts + [decode_context / decodes if decodes else 0.0] * decodes)
    return ModelWorkerBatch(
        0, "mixed", np.arange(len(lens)), lens, np.full(prompts, each) if prompts else None, prompts, len(lens),
        int(prompt_tokens), decodes, float(lens.sum()), None, None, (), None, None, (), 0, 0, len(lens),  # type: ignore[arg-type]
    )  # fmt: skip


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")
