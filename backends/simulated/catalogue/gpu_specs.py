"""GPUs: the figures of their datasheets, and how much of these operators achieve."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.link import Link, parse_rate, parse_time
from ground.value_file import read_toml

CATALOGUE = Path(__file__).parent / "gpus.toml"
WITH_UNITS: dict[str, tuple[str, Callable[[object], float]]] = {
    "link": ("link_bandwidth", parse_rate),
    "link_latency": ("link_latency_s", parse_time),
    "node_link": ("node_link_bandwidth", parse_rate),
    "node_link_latency": ("node_link_latency_s", parse_time),
}
"""Keys of a GPU's file that say a field as a flag does, with a unit; ``link`` is what collectives achieve."""
LIKE, FORMER_LIKE = "efficiency_like", "reaches_like"
"""The key for what operators achieve on another GPU, and what it was called before."""


class CatalogueError(InputError):
    """A GPU or model that is in no catalogue, or a file that cannot be read as one, in one line."""


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
    """Share of the memory bandwidth achieved by matrix products that stream their weights, and by elementwise kernels."""
    compute_efficiency: float = 0.75
    """Share of the matrix rate achieved by large matrix products with 16-bit weights."""
    fp8_efficiency: float = 0.55
    """Share of the matrix rate achieved by large matrix products with 8-bit weights."""
    kv_efficiency: float = 0.85
    """Share of the memory bandwidth achieved by decode attention, which reads KV."""
    attention_efficiency: float = 0.50
    """Share of the bf16 matrix rate achieved by prefill attention."""
    expert_efficiency: float = 0.25
    """Share of the matrix rate achieved by the grouped products of routed experts."""
    kernel_overhead_s: float = 2e-6
    """Start and drain of an elementwise kernel inside a graph or a full launch queue."""
    product_overhead_s: float = 4e-6
    """Start and drain of a matrix product."""
    attention_overhead_s: float = 12e-6
    """Start and drain of the attention of one layer."""
    expert_overhead_s: float = 20e-6
    """Start and drain of the routed experts of one layer: sorting the tokens, two grouped products, summing up."""
    graph_gap_s: float = 0.5e-6
    """Pause between two kernels of a captured graph: 3.4 us a kernel of 2.9 us on a V100 (NVIDIA, "Getting Started with CUDA
    Graphs", 2019)."""
    link_latency_s: float = 8e-6
    """Latency of a collective or a transfer, whatever its size."""
    link_efficiency: float = 1.0
    """Share of the link bandwidth achieved by collectives."""
    host_bandwidth: float = 64e9
    """Bytes/s from the host's memory, one direction; the default is PCIe 5.0 x16."""
    gpus_per_node: int = 8
    node_link_bandwidth: float = 50e9
    """Bytes/s of one GPU to those of other nodes, one direction, as collectives achieve it; the default is an adapter of
    400 Gbit/s for each GPU."""
    node_link_latency_s: float = 10e-6
    """Latency of a collective between nodes: a guess, as are links between nodes altogether."""
    pcie_link: bool = False
    """Whether GPUs of a node reach each other over PCIe alone: how fast is then the machine's affair, not the GPU's."""
    multiprocessors: int = 0
    """Streaming multiprocessors; 0: not known here. Some kernels choose how to divide their work by them."""

    def flops_for(self, dtype: str) -> float:
        """Look up the peak FLOP/s of matrix products with weights of a dtype.

        Weights of a dtype that the hardware has no units for are converted to bf16 on the way.
        """
        native = {"fp8": self.fp8_flops, "int8": self.int8_flops, "fp32": self.fp32_flops}.get(dtype, 0.0)
        return native or self.bf16_flops

    @cached_property
    def link(self) -> Link:
        """What a collective between GPUs of a node achieves."""
        return Link(self.link_bandwidth * self.link_efficiency, self.link_latency_s)

    @cached_property
    def node_link(self) -> Link:
        """What a collective between GPUs of several nodes achieves."""
        return Link(self.node_link_bandwidth, self.node_link_latency_s)

    def with_links(
        self,
        link: float | None = None,
        link_latency_s: float | None = None,
        node_link: float | None = None,
        node_link_latency_s: float | None = None,
        gpus_per_node: int | None = None,
    ) -> GPU:
        """The GPU in a machine whose links collectives achieve other rates (bytes/s) and latencies of; None: as it says."""
        changed = {
            "link_bandwidth": link,
            "link_efficiency": None if link is None else 1.0,
            "link_latency_s": link_latency_s,
            "node_link_bandwidth": node_link,
            "node_link_latency_s": node_link_latency_s,
            "gpus_per_node": gpus_per_node,
        }
        return dataclasses.replace(self, **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]


def load_gpu(name: str) -> GPU:
    """Look up a GPU of the catalogue, or read a TOML file with the same fields.

    ``efficiency_like = NAME`` in either takes efficiencies, overheads and link latency from another GPU of the catalogue.
    Raises :class:`CatalogueError` in one line.
    """
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


def renamed_in_gpu(name: str) -> list[str]:
    """List the keys of a GPU's file that are called otherwise now, a note each; empty for a GPU of the catalogue."""
    path = Path(name)
    if path.suffix != ".toml" or FORMER_LIKE not in read_toml(path, CatalogueError):
        return []
    return [f"{path}: {FORMER_LIKE}: is called {LIKE} now; the next version no longer knows it"]


def same_gpu(one: str, other: str) -> bool:
    """Tell whether two names mean the same GPU: ``RTXPRO6000`` and ``rtx-pro-6000``, ``h100_sxm`` and ``h100``."""
    a, b = (re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removesuffix("sxm") for name in (one, other))
    return a == b


def gpu_names() -> list[str]:
    """List the names of the catalogue."""
    return list(_catalogue())


def _gpu(values: dict[str, Any], where: str) -> GPU:
    known = {field.name: field for field in dataclasses.fields(GPU)}
    values = _without_units(values, where)
    if FORMER_LIKE in values and LIKE in values:
        raise CatalogueError(f"{where}: {FORMER_LIKE}: given twice; it is called {LIKE}")
    for key in {LIKE, FORMER_LIKE} & values.keys():
        relative = values[key]
        if not isinstance(relative, str) or relative not in _catalogue():
            raise CatalogueError(f"{where}: {key}: {relative!r} is not a GPU of the catalogue")
        like = load_gpu(relative)
        achieved = {name: getattr(like, name) for name in known if _is_achieved(name)}
        values = achieved | {name: value for name, value in values.items() if name != key}
    for name, value in values.items():
        if name not in known:
            raise CatalogueError(f"{where}: {name}: no such field")
        if name in ("name", "source"):
            continue
        if name == "pcie_link":
            if not isinstance(value, bool):
                raise CatalogueError(f"{where}: {name}: {value!r} is not true or false")
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


def _without_units(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a GPU, with what keys of :data:`WITH_UNITS` say in their places."""
    found = {name: value for name, value in values.items() if name not in WITH_UNITS}
    for key, (field, parse) in WITH_UNITS.items():
        if key not in values:
            continue
        try:
            said = {field: parse(values[key])}
        except InputError as error:
            raise CatalogueError(f"{where}: {key}: {error}") from None
        if key == "link":
            said["link_efficiency"] = 1.0  # of what is achieved
        if twice := sorted(said.keys() & values.keys()):
            raise CatalogueError(f"{where}: {key}: given twice: {twice[0]} says the same")
        found |= said
    return found


def _is_achieved(field: str) -> bool:
    """Tell whether a field is what operators achieve on a GPU, as against a figure of its datasheet."""
    return field.endswith(("_efficiency", "_overhead_s")) or field == "link_latency_s"


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return read_toml(CATALOGUE)
