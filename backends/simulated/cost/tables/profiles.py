"""Profiles on disk, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.simulated.catalogue.gpu_specs import GPU, gpu_names, load_gpu, same_gpu
from backends.simulated.catalogue.model_specs import DTYPE_BYTES, ModelSpec, load_model
from backends.simulated.cost.cost_request import check_gpu, check_model
from backends.simulated.cost.models.fitted import TERMS
from backends.simulated.cost.models.operator_tables import Curve, Grid, OperatorTables, ProfileError, Provenance
from backends.simulated.cost.tables import aiconfigurator, fitted_file, llmservingsim, own_profile
from backends.simulated.cost.tables.csv_table import find_table, read_table, sizes
from backends.simulated.cost.tables.table_kinds import KINDS


def provenance(path: Path) -> Provenance:
    """Describe the origin of a profile. Raises :class:`ProfileError` for a path that is none."""
    if own_profile.is_own(path):
        return own_profile.provenance(path, 1)
    if llmservingsim.is_llmservingsim(path):
        return llmservingsim.provenance(path, 1)
    found = aiconfigurator.sets(path)
    if len(found) == 1:
        return aiconfigurator.provenance(found[0])
    if found:
        names = ", ".join(one.name for one in found)
        return Provenance(path, "aiconfigurator", names, "bf16")
    raise ProfileError(f"{path}: not a profile{_hint(path)}")


def identity(path: Path, kind: str = "profile") -> dict[str, str]:
    """The ``model``, ``gpu`` and ``dtype`` of our catalogues that a profile is of, where it says so and they are there."""
    source = fitted_file.provenance(path) if kind == "fitted" else provenance(path)
    found = {}
    gpus = [name for name in gpu_names() if same_gpu(source.gpu, name)]
    if gpus:
        found["gpu"] = gpus[0]
    if source.model is not None:
        found["model"] = source.model
    if source.dtype in DTYPE_BYTES:
        found["dtype"] = source.dtype
    return found


def host_phases(path: Path) -> Mapping[str, float]:
    """CPU phases that came with a profile; empty for formats that have none."""
    return own_profile.read_meta(path).get("host", {}) if own_profile.is_own(path) else {}


def read_profile(
    path: Path, tp: int, model: ModelSpec, gpu: GPU, dtype: str = "bf16", kv_dtype: str = "bf16", ep: int = 1
) -> OperatorTables:
    """The tables of a model on a GPU; those of operators of any shape are for a precision of KV and a number of GPUs that
    experts are spread over, too. Raises :class:`ProfileError` or ``CostError`` with one line."""
    source = provenance(path)
    check_model(path, source.model, model)
    if model.beyond_tables is not None:
        raise ProfileError(f"{path}: {model.name} {model.beyond_tables}, which are not read from tables; use roofline")
    if source.format == "aiconfigurator":
        return aiconfigurator.read(path, tp, model, gpu, dtype, kv_dtype, ep)
    check_gpu(path, source.gpu, gpu)
    if source.dtype != dtype:
        raise ProfileError(f"{path}: measured with {source.dtype} weights, not {dtype}")
    return (own_profile if source.format == own_profile.FORMAT else llmservingsim).read(path, tp, model)


# -- what a profile covers ----------------------------------------------------------------------------------------------


def describe(path: Path, model_name: str | None = None) -> dict[str, Any]:
    """Describe the origin of a profile and the range of each of its tables, for ``profile show``."""
    if path.is_file():
        return _describe_fitted(path)
    source = provenance(path)
    shown = {
        "path": str(path),
        "format": source.format,
        "model": source.model or "any",
        "gpu": source.gpu,
        "dtype": source.dtype,
        "engine": source.engine,
        "measured": source.measured,
    }
    parts = []
    if source.format == "aiconfigurator":
        if model_name is not None:
            for one in aiconfigurator.sets(path):
                gpu = load_gpu(identity(one).get("gpu", provenance(one).gpu))
                tables = read_profile(one, 1, load_model(model_name), gpu)
                parts.append(_covered(tables, f"{one.name}, {model_name}, tp 1"))
        else:
            parts = [{"title": one.name, "tables": _kinds(one), "missing": []} for one in aiconfigurator.sets(path)]
    else:
        reader = own_profile if source.format == own_profile.FORMAT else llmservingsim
        model = load_model(model_name or str(source.model))
        for tp in sizes(path):
            parts.append(_covered(reader.read(path, tp, model), f"tp {tp}"))
    return {"provenance": shown, "sizes": parts}


def _covered(tables: OperatorTables, title: str) -> dict[str, Any]:
    layer = dict(tables.layer)
    for curves in (tables.kinds or {}).values():
        layer |= curves
    rows = [_curve_row(name, curve, "tokens, a layer") for name, curve in layer.items()]
    rows += [_curve_row(name, curve, "tokens, a step") for name, curve in tables.once.items()]
    rows += [_curve_row(name, curve, "sequences") for name, curve in tables.head.items()]
    for mixer, times in tables.mixers.items():
        for what, grid in times.grids.items():
            rows.append(
                _grid_row(f"{what} of {mixer.described}", grid, (what, "tokens of each", "cached")[: len(grid.axes)])
            )
    if (attention := tables.attention) is not None:
        rows.append(_grid_row("attention of decodes", attention.decode, ("decodes", "context")))
        rows.append(_grid_row("attention with prompts", attention.mixed, ("prompt", "cached", "decodes", "context")))
        if attention.uneven_decode is not None:
            rows.append(_grid_row("uneven decodes", attention.uneven_decode, ("decodes", "unevenness", "mean")))
        if attention.uneven is not None:
            names = ("prompt", "cached", "decodes", "unevenness", "mean")
            rows.append(_grid_row("uneven decodes with prompts", attention.uneven, names))
    if tables.experts is not None:
        rows.append(_grid_row("experts", tables.experts, ("tokens", "experts")))
    if tables.all_reduce is not None:
        rows.append(_grid_row("all-reduce", tables.all_reduce, ("bytes",)))
    return {"title": title, "tables": rows, "missing": list(tables.missing)}


def _curve_row(name: str, curve: Curve, by: str) -> dict[str, Any]:
    return {
        "operator": name,
        "by": by,
        "range": f"{curve.counts[0]:,.0f} to {curve.most:,}",
        "points": len(curve.counts),
    }


def _grid_row(name: str, grid: Grid, axes: tuple[str, ...]) -> dict[str, Any]:
    ranges = [
        f"{axis[0]:,.4g} to {axis[-1]:,.0f}" if axis[-1] > 1 else f"{axis[0]:g} to {axis[-1]:g}" for axis in grid.axes
    ]
    points = 1
    for axis in grid.axes:
        points *= len(axis)
    return {"operator": name, "by": ", ".join(axes), "range": "; ".join(ranges), "points": points}


def _kinds(base: Path) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        file = find_table(base.parent, f"{base.name}_{kind}", missing_ok=True)
        if file is not None:
            count = len(read_table(file, (), ("latency",))["latency"])
            rows.append({"operator": kind, "by": "shape", "range": "see --model", "points": count})
    return rows


def _describe_fitted(path: Path) -> dict[str, Any]:
    content = fitted_file.read_fitted(path)
    shown = {
        "path": str(path),
        "format": fitted_file.FORMAT,
        "model": content["model"],
        "gpu": content["gpu"],
        "dtype": content["dtype"],
        "engine": "",
        "measured": f"from {content.get('fitted_from', '')}",
    }
    parts = []
    for number, stage in enumerate(content["stages"]):
        rows = [
            {"operator": term, "by": "coefficient", "range": f"{stage[term] * 1e6:.4g} us", "points": 1}
            for term in TERMS
        ]
        parts.append({"title": f"stage {number}", "tables": rows, "missing": []})
    return {"provenance": shown, "sizes": parts}


def _hint(path: Path) -> str:
    if not path.is_dir():
        return ": no such folder"
    inside = sorted(
        str(p.parent.relative_to(path)) for name in ("meta.yaml", own_profile.META_FILE) for p in path.rglob(name)
    )
    return f" (these inside it are: {', '.join(inside[:4])})" if inside else ""
