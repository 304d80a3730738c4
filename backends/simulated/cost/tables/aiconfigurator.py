"""AIConfigurator's operator tables in CSV: one set of files a GPU and engine, for operators of any shape, milliseconds.

``PATH`` is the common beginning of the files (``.../h100_sxm_sglang-0.5.14``) or the folder that holds them. They are read
as those of the package (``published_package``) are, but what a model needs must have been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from backends.checkpoint.precision import as_precision
from backends.simulated.catalogue.gpu_specs import GPU, same_gpu
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.operator_tables import OperatorTables, ProfileError, Provenance
from backends.simulated.cost.tables.attention_kernels import ATTENTION, KERNEL, of_one_kernel
from backends.simulated.cost.tables.csv_table import find_table, read_table
from backends.simulated.cost.tables.measured_operators import OperatorReader
from backends.simulated.cost.tables.table_kinds import KINDS, OPTIONAL, Columns, Tables


@dataclass(frozen=True)
class CsvTables:
    """A set in CSV form."""

    base: Path
    """Common beginning of the files."""
    version: str = ""

    def table(self, kind: str) -> Columns:
        """Columns of a table."""
        return _read(self.base, kind)

    def versions(self, kind: str) -> list[str]:
        """The one that the set is of, if it has such a table."""
        return (
            [] if find_table(self.base.parent, f"{self.base.name}_{kind}", missing_ok=True) is None else [self.version]
        )

    def at(self, version: str) -> CsvTables:
        """The set itself."""
        return self

    def elsewhere(self) -> list[Tables]:
        """None."""
        return []

    def named(self, version: str, kind: str) -> str:
        """The set itself."""
        return f"in {self.base.name}"

    def __str__(self) -> str:
        return str(self.base)


def sets(path: Path) -> list[Path]:
    """The sets of tables that ``path`` means: itself, or those in the folder."""
    if find_table(path.parent, f"{path.name}_gemm", missing_ok=True) is not None:
        return [path]
    if not path.is_dir():
        return []
    return sorted({file.with_name(file.name.split("_gemm.csv")[0]) for file in path.glob("*_gemm.csv*")})


def provenance(path: Path) -> Provenance:
    """Describe the origin of one set of tables."""
    gpu, _, engine = path.name.rpartition("_")
    name, _, version = engine.partition("-")
    return Provenance(path, "aiconfigurator", gpu, "bf16", None, f"{name} {version}".strip())


def read(
    path: Path, tp: int, model: ModelSpec, gpu: GPU, dtype: str, kv_dtype: str = "bf16", ep: int = 1
) -> OperatorTables:
    """The tables of a model on the set's GPU. Raises :class:`ProfileError` for what was not measured."""
    found = [one for one in sets(path) if same_gpu(provenance(one).gpu, gpu.name)]
    if not found:
        have = ", ".join(provenance(one).gpu for one in sets(path))
        raise ProfileError(f"{path}: measured on {have}, not {gpu.name}")
    base = found[0]
    want = CostRequest(model, gpu, as_precision(dtype), kv_dtype, tp, ep=ep)
    reader = OperatorReader(want, CsvTables(base))
    tables = reader.read(provenance(base))
    if reader.lacking:
        raise ProfileError(f"{base}: {model.name}: not in these tables: {'; '.join(reader.lacking)}; use roofline")
    tables.missing = [
        "norms, rotary and activation functions, embedding, sampler: by the roofline",
        "prompts beside decodes: one after the other",
    ]
    return tables


@lru_cache(maxsize=4)
def _read(base: Path, kind: str) -> Columns:
    text, numbers = KINDS[kind].text, KINDS[kind].numbers
    optional: dict[str, float | str] = {**OPTIONAL, **({KERNEL: ""} if kind in ATTENTION else {})}
    columns = read_table(find_table(base.parent, f"{base.name}_{kind}"), text, numbers, optional)
    of = of_one_kernel(columns) if kind in ATTENTION else slice(None)
    return {name: np.asarray(values)[of] for name, values in columns.items()}
