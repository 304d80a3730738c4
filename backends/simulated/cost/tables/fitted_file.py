"""Fitted costs on disk: one JSON file, written by a calibration and read by the runs that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.simulated.cost.cost_request import CostRequest, check_gpu, check_model
from backends.simulated.cost.models.fitted import TERMS, Coefficients, Fit, FittedCost
from backends.simulated.cost.models.operator_tables import ProfileError, Provenance
from ground.json_file import read_json, write_json

FORMAT = "workbench fitted costs"
FORMAT_VERSION = 1


def write_fitted(
    path: Path,
    fits: list[Fit],
    host: Mapping[str, float],
    *,
    model: str,
    gpu: str,
    dtype: str,
    tp: int,
    source: str,
    host_errors: Mapping[str, float],
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Write fitted costs as one JSON file."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": model,
        "gpu": gpu,
        "dtype": dtype,
        "tp": tp,
        "pp": len(fits),
        "fitted_from": source,
        "stages": [
            {
                "knee_tokens": fit.coefficients.knee_tokens,
                **dict(zip(TERMS, fit.coefficients.values, strict=True)),
                "steps": fit.steps,
                "mean_error": fit.mean_error,
                "total_error": fit.total_error,
            }
            for fit in fits
        ],
        "host": dict(host),
        "host_errors": dict(host_errors),
    }
    if measured is not None:
        content["measured"] = dict(measured)
    write_json(path, content, ProfileError)


def read_fitted(path: Path) -> dict[str, Any]:
    """The content of such a file. Raises :class:`ProfileError` naming file and field."""
    content = read_json(path, ProfileError)
    if content.get("format") != FORMAT:
        raise ProfileError(f"{path}: not fitted costs (`workbench calibrate --from RECORD` writes them)")
    if content.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"{path}: format_version: {content.get('format_version')}, this workbench reads {FORMAT_VERSION}"
        )
    for name in ("model", "gpu", "dtype", "stages", "host"):
        if name not in content:
            raise ProfileError(f"{path}: {name}: missing")
    for number, stage in enumerate(content["stages"]):
        for term in (*TERMS, "knee_tokens"):
            value = stage.get(term)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ProfileError(f"{path}: stages[{number}].{term}: {value!r} is not a number of 0 or more")
    for name, value in content["host"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ProfileError(f"{path}: host.{name}: {value!r} is not a number of 0 or more")
    return content


def provenance(path: Path) -> Provenance:
    """Describe the origin of fitted costs."""
    content = read_fitted(path)
    return Provenance(path, FORMAT, content["gpu"], content["dtype"], content["model"], tp=int(content.get("tp", 1)))


def load_fitted(path: Path, want: CostRequest) -> FittedCost:
    """The cost model of a file, checked against what it is wanted for. Raises ``ProfileError`` or ``CostError``."""
    content = read_fitted(path)
    check_model(path, content["model"], want.model)
    check_gpu(path, content["gpu"], want.gpu)
    for name, wanted in (("dtype", want.dtype), ("tp", want.tp)):
        if content.get(name, wanted) != wanted:
            raise ProfileError(f"{path}: fitted with {name} {content[name]}, not {wanted}")
    if len(content["stages"]) != want.pp:
        raise ProfileError(f"{path}: fitted with pp {len(content['stages'])}, not {want.pp}")
    stages = [Coefficients(tuple(float(s[t]) for t in TERMS), int(s["knee_tokens"])) for s in content["stages"]]
    return FittedCost(stages, want.model, want.gpu, want.tp)
