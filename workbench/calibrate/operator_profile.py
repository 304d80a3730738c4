"""A profile of our own runner (docs/profiles.md): tables of its timed operators, and what real steps take beside them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.capture_sizes import default_capture_sizes
from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, load_model
from backends.simulated.cost.models.least_squares import relative_least_squares
from backends.simulated.cost.models.operator_tables import ProfileError
from backends.simulated.cost.models.profile import DENSE_ONLY, ProfileCost
from backends.simulated.cost.tables import own_profile
from backends.simulated.host_fit import fit_host
from reports.record.errors import RecordError
from workbench.calibrate.operators import Shape, read_shape, shape_files
from workbench.calibrate.points import read_conditions, read_steps
from workbench.scheduler.batch import ModelWorkerBatch

ONCE, HEAD, ATTENTION, EXPERTS = ("embedding", "final_layernorm"), ("lm_head", "sampler"), "attention", "experts"
BESIDE = "beside"
"""What a step takes beside its operators."""


def profiled_model(name: str) -> ModelSpec:
    """The shape of a model that a profile can hold. Raises CatalogueError or ProfileError."""
    model = load_model(name)
    if model.beyond_tables is not None:
        raise ProfileError(f"{name}: {model.beyond_tables}, which no profile holds; --out FILE.json fits whole steps")
    return model


def write_operators(folder: Path, out: Path) -> dict[str, Any]:
    """Make the profile ``out``, a folder, of a folder of points, and return what ``profile.json`` says.

    The operators were timed alone. What the points' real steps took on top is fitted to them (:class:`Beside`). All of
    ``out`` is written, or nothing.

    Raises RecordError for a file that cannot be read, and what :func:`profiled_model` raises.
    """
    measured = read_conditions(folder)
    timed = [read_shape(file) for file in shape_files(folder)]
    if not timed:
        raise RecordError(f"{folder}: no operators were timed; from the points alone, --out FILE.json can be had")
    model = profiled_model(measured["model"])
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
            "engine": "workbench",
            "host": {name: _rounded(value) for name, value in host.items()},
            "measured": f"{different} steps by operator and {len(steps['seconds']):,} in runs, in {folder.name}",
            "conditions": measured,
            "host_errors": {name: round(value, 6) for name, value in errors.items()},
            "operators": {"steps": different, **{name: _rounded(value) for name, value in asdict(beside).items()}},
        }
        own_profile.write_profile(partial, measured["tp"], meta, scaled)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return own_profile.read_meta(out)


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
    """Time of real steps: ``factor`` times their operators (two threads on few cores slow each other down), and ``step_s``
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
        0,
        "mixed",
        np.arange(len(lens)),
        0,
        lens,
        np.array([each] * prompts + [1.0] * decodes),
        prompts,
        len(lens),
        int(prompt_tokens),
        decodes,
        float(lens.sum()),  # type: ignore[arg-type]
        None,
        None,
        (),
        None,
        None,
        (),
        0,
        0,
        len(lens),
    )


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")
