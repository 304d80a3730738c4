"""GPUs: datasheet figures and what of them is achievable."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.value_file import read_toml

CATALOGUE = Path(__file__).parent / "gpus.toml"


class CatalogueError(InputError):
    """Something that is in no catalogue, or a file that cannot be read as one, in one line."""


@dataclass(frozen=True)
class GPU:
    """One accelerator. Rates are per second; peaks are dense, without sparsity."""

    name: str
    memory_bytes: float
    memory_bandwidth: float
    """Bytes/s."""
    bf16_flops: float
    link_bandwidth: float
    """Bytes/s to a peer in the node, one direction."""
    source: str
    fp8_flops: float = 0.0
    """0: no such units; fp8 weights are then converted and computed in bf16."""
    fp32_flops: float = 0.0
    int8_flops: float = 0.0
    memory_efficiency: float = 0.82
    """Share of the bandwidth that products which stream their weights, and elementwise kernels, reach."""
    compute_efficiency: float = 0.75
    """Share of the matrix rate that large products reach."""
    fp8_efficiency: float = 0.55
    """The same with eight-bit weights."""
    kv_efficiency: float = 0.85
    """Share of the bandwidth at which the attention of decodes reads KV."""
    attention_efficiency: float = 0.50
    """Share of the bf16 matrix rate that the attention of prompts reaches."""
    expert_efficiency: float = 0.25
    """Share of the matrix rate that the grouped products of routed experts reach."""
    kernel_overhead_s: float = 2e-6
    """Start and drain of an elementwise kernel inside a graph or a full launch queue."""
    product_overhead_s: float = 4e-6
    """The same of a matrix product."""
    attention_overhead_s: float = 12e-6
    """The same of a layer's attention."""
    expert_overhead_s: float = 20e-6
    """The same of a layer's routed experts: sorting the tokens, two grouped products, summing up."""
    graph_gap_s: float = 0.5e-6
    """Between two kernels of a captured graph: 3.4 us a kernel of 2.9 us on a V100 (NVIDIA, "Getting Started with CUDA
    Graphs", 2019)."""
    link_latency_s: float = 8e-6
    link_efficiency: float = 1.0
    """Share of the link's bandwidth that collectives reach."""
    host_bandwidth: float = 64e9
    """Bytes/s from the host's memory, one direction; the default is PCIe 5.0 x16."""
    gpus_per_node: int = 8
    multiprocessors: int = 0
    """Streaming multiprocessors; 0: not known here. Some kernels choose how to divide their work by them."""

    def flops_for(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products. Weights narrower than the hardware computes are converted to bf16 on the way."""
        native = {"fp8": self.fp8_flops, "int8": self.int8_flops, "fp32": self.fp32_flops}.get(dtype, 0.0)
        return native or self.bf16_flops


def load_gpu(name: str) -> GPU:
    """A GPU of the catalogue, or of a TOML file with the same fields. ``reaches_like = NAME`` in either takes what operators
    reach from another GPU of the catalogue. Raises :class:`CatalogueError` in one line."""
    path = Path(name)
    if path.suffix == ".toml":
        return _gpu({"name": path.stem, "source": str(path), **read_toml(path, CatalogueError)}, str(path))
    catalogue = _catalogue()
    key = name.lower()
    if key not in catalogue:
        near = difflib.get_close_matches(key, catalogue, 3, 0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(catalogue)}"
        raise CatalogueError(f"unknown GPU {name!r}; {hint} (or a TOML file)")
    return _gpu({"name": key, **catalogue[key]}, CATALOGUE.name)


def gpu_names() -> list[str]:
    """Names of the catalogue."""
    return list(_catalogue())


def _gpu(values: dict[str, Any], where: str) -> GPU:
    known = {field.name: field for field in dataclasses.fields(GPU)}
    relative = values.get("reaches_like")
    if relative is not None:
        if not isinstance(relative, str) or relative not in _catalogue():
            raise CatalogueError(f"{where}: reaches_like: {relative!r} is not a GPU of the catalogue")
        like = load_gpu(relative)
        values = {name: getattr(like, name) for name in known if _is_reached(name)} | values
        del values["reaches_like"]
    for name, value in values.items():
        if name not in known:
            raise CatalogueError(f"{where}: {name}: no such field")
        if name in ("name", "source"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CatalogueError(f"{where}: {name}: {value!r} is not a number of 0 or more")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and not values.get(name):
            raise CatalogueError(f"{where}: {name}: missing")
    for name in (name for name in known if name.endswith("_efficiency")):
        if name in values and not 0 < values[name] <= 1:
            raise CatalogueError(f"{where}: {name}: {values[name]} is not between 0 and 1")
    return GPU(**values)


def _is_reached(field: str) -> bool:
    """Whether a field says what operators make of a GPU, as against what its datasheet says."""
    return field.endswith(("_efficiency", "_overhead_s")) or field == "link_latency_s"


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return read_toml(CATALOGUE)
