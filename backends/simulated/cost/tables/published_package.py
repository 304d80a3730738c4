"""The operator tables that the package ``aiconfigurator-core`` carries, found by GPU, engine and version.

``systems/data/SYSTEM/FAMILY/ENGINE/VERSION/KIND_perf.parquet``, each family of operators under the versions of the engine
that it was measured with (NCCL's of NCCL). Nothing of it is copied, and the package is never imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU, same_gpu
from backends.simulated.cost.cost_request import CostError
from backends.simulated.cost.models.operator_tables import NotMeasured, ProfileError
from backends.simulated.cost.tables.attention_kernels import ATTENTION, KERNEL, of_one_kernel
from backends.simulated.cost.tables.csv_table import first_unfit
from backends.simulated.cost.tables.table_kinds import KINDS, OPTIONAL, Columns, Keep, Tables

PACKAGE, DISTRIBUTION = "aiconfigurator_core", "aiconfigurator-core"
INSTALL = 'pip install "llm-workbench[profiles]"'
ENGINES = ("vllm", "sglang")
"""Engines that both our presets and the tables know."""


@dataclass(frozen=True)
class PublishedTables:
    """The tables of one GPU and engine, each of the version nearest to ``version``."""

    system: Path
    engine: str
    version: str
    keep: Keep | None = None
    """Which rows may be read; None: all."""

    def table(self, kind: str) -> Columns:
        """Columns of a table. Raises :class:`ProfileError` for one that cannot be read, NotMeasured without any."""
        file = self.file_of(kind)
        columns = _kept(file, file.stat().st_mtime_ns, kind, self.keep)
        if not len(columns["latency"]):
            raise NotMeasured(f"{self}: no rows of {kind!r} that may be read")
        return columns

    def file_of(self, kind: str) -> Path:
        """The file of the nearest version that has a table of a kind. Raises NotMeasured without any."""
        version = self.version_of(kind)
        if version is None:
            raise NotMeasured(f"{self}: no table {kind!r}")
        return self._files(kind)[version]

    def version_of(self, kind: str) -> str | None:
        """The version whose table of a kind is read; None where there is no such table."""
        return next(iter(self.versions(kind)), None)

    def versions(self, kind: str) -> list[str]:
        """Versions that there is a table of a kind for, the nearest first; the latest first of what is no engine, and where
        no version is asked for."""
        found = list(self._files(kind))
        if KINDS[kind].source is not None or not self.version:
            return sorted(found, key=_numbers, reverse=True)
        return by_nearness(self.version, found)

    def at(self, version: str) -> PublishedTables:
        """The same tables for another version."""
        return replace(self, version=version)

    def elsewhere(self) -> list[Tables]:
        """Tables of the same GPU under the other engines, of any version."""
        return [replace(self, engine=name, version="") for name in ENGINES if name != self.engine]

    def named(self, version: str, kind: str) -> str:
        """What a table of a version was measured under, in words."""
        if KINDS[kind].source is not None:
            return f"with {kind.upper()} {version}"
        near = "" if version == self.version or not self.version else f", the nearest to {self.version}"
        return f"under {self.engine} {version}{near}"

    def _files(self, kind: str) -> dict[str, Path]:
        """The tables of a kind by version."""
        name = f"{kind}_perf.parquet"
        found = sorted((self.system / KINDS[kind].family / (KINDS[kind].source or self.engine)).glob(f"*/{name}"))
        return {file.parent.name: file for file in found}

    def __str__(self) -> str:
        return f"{self.system.name}, {self.engine}"


def find_tables(gpu: GPU, engine: str, keep: Keep | None = None) -> PublishedTables:
    """The tables for a GPU and an engine's preset (``vllm-0.33.0``), of which ``keep`` says what may be read. Raises
    :class:`CostError` with what to do where there are none."""
    name, _, version = engine.partition("-")
    if name not in ENGINES:
        raise CostError(
            f"cost: measured: no operators of the engine {engine!r} are published; give --engine {' or '.join(ENGINES)}"
        )
    data = _data_folder()
    if data is None:
        raise CostError(f"cost: measured: the tables are in a package that is not installed: {INSTALL}")
    known = _systems(data, name)
    for system in known:
        if same_gpu(_gpu_name(system), gpu.name):
            return PublishedTables(system, name, version, keep)
    have = ", ".join(map(_gpu_name, known)) or "none"
    raise CostError(f"cost: measured: {described()} has no tables of {name} on {gpu.name}; it has {have}")


def at_hand(gpu: str, engine: str) -> bool:
    """Tell whether there are tables here for a GPU of the catalogue and an engine's preset."""
    data, name = _data_folder(), engine.partition("-")[0]
    systems = [] if data is None or name not in ENGINES else _systems(data, name)
    return any(same_gpu(_gpu_name(system), gpu) for system in systems)


def _systems(data: Path, engine: str) -> list[Path]:
    """Folders of the GPUs that an engine was measured on."""
    return [each for each in sorted(data.iterdir()) if any((each / "gemm" / engine).glob("*/gemm_perf.parquet"))]


def described() -> str:
    """The package and its version."""
    data = _data_folder()
    root = [] if data is None else [str(data.parents[2])]
    found = next(iter(distributions(name=DISTRIBUTION, path=root)), None)
    return DISTRIBUTION if found is None else f"{DISTRIBUTION} {found.version}"


def by_nearness(wanted: str, versions: list[str]) -> list[str]:
    """The versions by how near they are to ``wanted``: number by number, the first that differs counting most; the later of
    two that are equally near first."""

    def distance(version: str) -> tuple[list[int], list[int]]:
        own = _numbers(version)
        length = max(len(own), len(target))
        a, b = (numbers + [0] * (length - len(numbers)) for numbers in (own, target))
        return [abs(x - y) for x, y in zip(a, b, strict=True)], [-x for x in a]

    target = _numbers(wanted)
    return sorted(versions, key=distance)


def _numbers(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def _gpu_name(system: Path) -> str:
    """A name of the catalogue for the name of a system."""
    return system.name.removesuffix("_sxm").removesuffix("_server").replace("_", "-")


def _data_folder() -> Path | None:
    try:
        spec = find_spec(PACKAGE)
    except ImportError:  # some finders raise it for what is not there
        spec = None
    for place in () if spec is None else spec.submodule_search_locations or ():
        if (folder := Path(place) / "systems" / "data").is_dir():
            return folder
    return None


@lru_cache(maxsize=16)
def _kept(file: Path, changed_ns: int, kind: str, keep: Keep | None) -> Columns:
    """Columns of the rows of a file that may be read: those of the kernel that an engine takes."""
    columns = _read(file, changed_ns, kind)
    of = of_one_kernel(columns) if kind in ATTENTION else None
    if keep is not None:
        from pyarrow import parquet

        kept = keep(kind, parquet.read_table(file, partitioning=None).to_pandas())
        of = kept if of is None else kept & of
    return columns if of is None or of.all() else {name: values[of] for name, values in columns.items()}


@lru_cache(maxsize=16)
def _read(file: Path, changed_ns: int, kind: str) -> Columns:
    """Columns of a file that was last changed then."""
    import pyarrow
    from pyarrow import parquet

    text, numbers = KINDS[kind].text, KINDS[kind].numbers
    try:
        there = parquet.read_schema(file).names
        for name in (*text, *numbers):
            if name not in there:
                raise ProfileError(f"{file}: no column {name!r}")
        words = [*text, KERNEL] if kind in ATTENTION and KERNEL in there else text
        asked = [name for name in (*words, *numbers, *OPTIONAL) if name in there]
        found = parquet.read_table(file, columns=asked, partitioning=None)
        columns: dict[str, Any] = {name: found[name].to_numpy().astype(str) for name in words}
        for name in (*numbers, *OPTIONAL):
            columns[name] = (
                found[name].cast(pyarrow.float64()).to_numpy()
                if name in there
                else np.full(found.num_rows, OPTIONAL[name])
            )
    except (OSError, pyarrow.ArrowException) as error:
        raise ProfileError(f"{file}: {str(error).splitlines()[0]}") from error
    if not found.num_rows:
        raise ProfileError(f"{file}: no rows")
    for name in (*numbers, *OPTIONAL):
        if (row := first_unfit(columns[name])) is not None:
            raise ProfileError(f"{file}: row {row + 1}: {name}: {columns[name][row]} is not a number of 0 or more")
    return columns
