"""Our own profile format: one folder, ``profile.json`` for where it comes from and CSV tables in seconds
(docs/profiles.md)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.attention_table import attention_table
from backends.simulated.cost.models.operator_tables import (
    Curve,
    Grid,
    OperatorTables,
    ProfileError,
    Provenance,
    grid_from_points,
)
from backends.simulated.cost.tables.csv_table import find_table, read_table, size_folder
from ground.json_file import read_json, write_json

FORMAT = "workbench profile"
FORMAT_VERSION = 1
META_FILE = "profile.json"
TABLES: dict[str, tuple[str, ...]] = {
    "layer": ("operator", "tokens", "seconds"),
    "once": ("operator", "tokens", "seconds"),
    "head": ("operator", "sequences", "seconds"),
    "attention": ("prompt_tokens", "cached_tokens", "decodes", "context_tokens", "seconds"),
    "uneven": ("prompt_tokens", "cached_tokens", "decodes", "longest_tokens", "mean_tokens", "seconds"),
    "experts": ("tokens", "distinct_experts", "seconds"),
    "all_reduce": ("bytes", "seconds"),
}
"""Tables and their columns. ``layer``, ``head`` and ``attention`` must be there, and ``experts`` for a model that has
any."""
PROMPTS = "prompts"
"""Optional column of ``attention``, before the seconds: into how many equal prompts the prompt tokens divide, each after so
many cached ones."""
STAIRCASE = "matrix:"
"""Prefix of operators that are matrix products: see :class:`Curve`."""


def is_own(path: Path) -> bool:
    """Tell whether a folder is a profile of this format."""
    return (path / META_FILE).is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """The facts of ``profile.json``. Raises :class:`ProfileError`."""
    file = path / META_FILE
    meta = read_json(file, ProfileError)
    if meta.get("format") != FORMAT:
        raise ProfileError(f"{file}: format: not {FORMAT!r}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"{file}: format_version: {meta.get('format_version')}, this workbench reads {FORMAT_VERSION}"
        )
    for name in ("model", "gpu", "dtype"):
        if not isinstance(meta.get(name), str):
            raise ProfileError(f"{file}: {name}: missing")
    for name, value in meta.get("host", {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ProfileError(f"{file}: host.{name}: {value!r} is not a number of 0 or more")
    return meta


def provenance(path: Path, tp: int) -> Provenance:
    """Describe the origin of a profile."""
    meta = read_meta(path)
    return Provenance(
        path,
        FORMAT,
        meta["gpu"],
        meta["dtype"],
        meta["model"],
        str(meta.get("engine", "")),
        str(meta.get("measured", "")),
        tp,
        tuple(meta.get("notes", ())),
    )


def read(path: Path, tp: int, model: ModelSpec) -> OperatorTables:
    """The tables of one tensor-parallel size. Raises :class:`ProfileError` for what is missing or cannot be read."""
    folder = size_folder(path, tp)
    file = find_table(folder, "attention")
    columns = read_table(file, (), TABLES["attention"], {PROMPTS: 0.0})
    prompts = columns[PROMPTS] if columns[PROMPTS].any() else None
    uneven = None
    table = find_table(folder, "uneven", missing_ok=True)
    if table is not None:
        rows = read_table(table, (), TABLES["uneven"])
        uneven = dict(
            zip(
                ("prefill", "cached", "decodes", "longest", "mean", "seconds"),
                (rows[name] for name in TABLES["uneven"]),
                strict=True,
            )
        )
    experts = None
    if any(model.moe_layers):
        rows = read_table(find_table(folder, "experts"), (), TABLES["experts"])
        points = np.stack((rows["tokens"], rows["distinct_experts"]), axis=1)
        experts = grid_from_points(points, rows["seconds"], (0, 1))
    reduce = None
    table = find_table(folder, "all_reduce", missing_ok=True)
    if table is not None:
        rows = read_table(table, (), TABLES["all_reduce"])
        reduce = Grid((rows["bytes"].tolist(),), rows["seconds"])
    return OperatorTables(
        provenance(path, tp),
        _curves(folder, "layer"),
        _curves(folder, "once", missing_ok=True),
        _curves(folder, "head"),
        attention_table(_stacked(columns), columns["seconds"], file, uneven, prompts=prompts),
        experts,
        reduce,
        layers_timed=True,
    )


def _stacked(columns: dict[str, Any]) -> np.ndarray:
    return np.stack([columns[name] for name in TABLES["attention"][:4]], axis=1)


def _curves(folder: Path, table: str, *, missing_ok: bool = False) -> dict[str, Curve]:
    file = find_table(folder, table, missing_ok=missing_ok)
    if file is None:
        return {}
    operator, count, seconds = TABLES[table]
    columns = read_table(file, (operator,), (count, seconds))
    names = np.array(columns[operator])
    return {
        str(name).removeprefix(STAIRCASE): Curve(
            columns[count][names == name], columns[seconds][names == name], staircase=str(name).startswith(STAIRCASE)
        )
        for name in dict.fromkeys(columns[operator])
    }


def write_profile(path: Path, tp: int, meta: Mapping[str, Any], tables: Mapping[str, Iterable[Sequence[Any]]]) -> None:
    """Write one tensor-parallel size of a profile: ``meta`` (``model``, ``gpu``, ``dtype``, and what else is known) and
    the rows of each table, in the order of its columns, in ``attention`` with or without :data:`PROMPTS`.

    Raises ``ValueError`` for a table that the format does not have.
    """
    for name in tables:
        if name not in TABLES:
            raise ValueError(f"a profile has no table {name!r}")
    folder = path / f"tp{tp}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            listed = list(rows)
            *by, seconds = TABLES[name]
            optional = [PROMPTS] if name == "attention" and listed and len(listed[0]) > len(TABLES[name]) else []
            writer.writerow((*by, *optional, seconds))
            writer.writerows(listed)
    content = {**meta, "format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(path / META_FILE, content, ProfileError, sort_keys=True)
