"""GPUs: the figures of their datasheets, and how much of these operators achieve."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from backends.simulated.catalogue.product_rates import ProductRates
from ground.errors import InputError
from ground.link import Link, parse_latency, parse_rate
from ground.value_file import read_toml

CATALOGUE = Path(__file__).parent / "gpus.toml"
WITH_UNITS: dict[str, tuple[str, Callable[[object], float]]] = {
    "link": ("link_bandwidth", parse_rate),
    "link_latency": ("link_latency_s", parse_latency),
    "node_link": ("node_link_bandwidth", parse_rate),
    "node_link_latency": ("node_link_latency_s", parse_latency),
}
"""Keys of a GPU's file that say a field as a flag does, with a unit; ``link`` is what collectives achieve."""
NODE_LINK = {"node_link_bandwidth", "node_link_latency_s"}
EFFICIENCIES = CATALOGUE.with_name("efficiencies.toml")
"""What operators achieve on GPUs that published tables were measured on, written by ``benchmarks/roofline_fit.py``."""
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
    fp4_flops: float = 0.0
    """0: no such units; fp4 weights are then converted and computed in bf16."""
    tdp_w: float = 0.0
    """The most it may draw, W; 0: nobody knows."""
    idle_w: float = 0.0
    prefill_w: float = 0.0
    decode_w: float = 0.0
    """What it draws while nothing runs, prompts are computed, and while it decodes, W; 0: shares of the TDP."""
    memory_efficiency: float = 0.87
    """Share of the memory bandwidth achieved by 16-bit matrix products that stream their weights, and by elementwise
    kernels."""
    compute_efficiency: float = 0.75
    """Share of the matrix rate achieved by large matrix products in 16 bits."""
    product_overhead_s: float = 3e-6
    """Start and drain of a matrix product in 16 bits."""
    product_depth_s: float = 0.3e-9
    """Seconds that a matrix product in 16 bits takes for each row of its weights: sums over them are one after another."""
    fp8_memory_efficiency: float = 0.88
    """As ``memory_efficiency``, in 8 bits."""
    fp8_efficiency: float = 0.55
    """As ``compute_efficiency``, in 8 bits."""
    fp8_overhead_s: float = 5e-6
    """As ``product_overhead_s``, in 8 bits."""
    fp8_depth_s: float = 0.5e-9
    """As ``product_depth_s``, in 8 bits."""
    block_memory_efficiency: float = 0.0
    """As ``memory_efficiency``, in fp8 with a scale for each block of weights."""
    block_efficiency: float = 0.0
    """As ``compute_efficiency``, of such weights; 0: they take as long as any in 8 bits."""
    block_overhead_s: float = 0.0
    """As ``product_overhead_s``, of such weights."""
    block_depth_s: float = 0.0
    """As ``product_depth_s``, of such weights."""
    fp4_memory_efficiency: float = 0.84
    """As ``memory_efficiency``, in fp4."""
    fp4_efficiency: float = 0.42
    """As ``compute_efficiency``, in fp4."""
    fp4_overhead_s: float = 6e-6
    """As ``product_overhead_s``, in fp4."""
    fp4_depth_s: float = 0.34e-9
    """As ``product_depth_s``, in fp4."""
    expert_memory_efficiency: float = 0.95
    """Share of the memory bandwidth achieved by the grouped products of routed experts on their weights, in 16 bits."""
    expert_efficiency: float = 0.45
    """Share of the matrix rate achieved by them."""
    expert_activation_efficiency: float = 0.7
    """Share of the memory bandwidth achieved by what is moved in and out of them."""
    expert_overhead_s: float = 20e-6
    """Start and drain of the routed experts of one layer: sorting the tokens, two grouped products, summing up."""
    expert_depth_s: float = 2e-9
    """As ``product_depth_s``, of both grouped products."""
    expert_each_overhead_s: float = 0.05e-6
    """Seconds for each expert that has tokens, of one layer on one GPU."""
    fp8_expert_memory_efficiency: float = 0.95
    """As ``expert_memory_efficiency``, in 8 bits."""
    fp8_expert_efficiency: float = 0.45
    """As ``expert_efficiency``, in 8 bits."""
    fp8_expert_activation_efficiency: float = 0.4
    """As ``expert_activation_efficiency``, in 8 bits."""
    fp8_expert_overhead_s: float = 20e-6
    """As ``expert_overhead_s``, in 8 bits."""
    fp8_expert_depth_s: float = 2e-9
    """As ``expert_depth_s``, in 8 bits."""
    fp8_expert_each_overhead_s: float = 0.05e-6
    """As ``expert_each_overhead_s``, in 8 bits."""
    block_expert_memory_efficiency: float = 0.0
    """As ``expert_memory_efficiency``, in fp8 with a scale for each block of weights."""
    block_expert_efficiency: float = 0.0
    """As ``expert_efficiency``, of such weights; 0: they take as long as any in 8 bits."""
    block_expert_activation_efficiency: float = 0.0
    """As ``expert_activation_efficiency``, of such weights."""
    block_expert_overhead_s: float = 0.0
    """As ``expert_overhead_s``, of such weights."""
    block_expert_depth_s: float = 0.0
    """As ``expert_depth_s``, of such weights."""
    block_expert_each_overhead_s: float = 0.0
    """As ``expert_each_overhead_s``, of such weights."""
    fp4_expert_memory_efficiency: float = 0.95
    """As ``expert_memory_efficiency``, in fp4."""
    fp4_expert_efficiency: float = 0.8
    """As ``expert_efficiency``, in fp4."""
    fp4_expert_activation_efficiency: float = 0.45
    """As ``expert_activation_efficiency``, in fp4."""
    fp4_expert_overhead_s: float = 10e-6
    """As ``expert_overhead_s``, in fp4."""
    fp4_expert_depth_s: float = 1e-9
    """As ``expert_depth_s``, in fp4."""
    fp4_expert_each_overhead_s: float = 0.08e-6
    """As ``expert_each_overhead_s``, in fp4."""
    w4_expert_memory_efficiency: float = 0.7
    """As ``expert_memory_efficiency``, of weights in four bits that are multiplied in 16."""
    w4_expert_efficiency: float = 0.4
    """As ``expert_efficiency``, of such weights."""
    w4_expert_activation_efficiency: float = 0.5
    """As ``expert_activation_efficiency``, of such weights."""
    w4_expert_overhead_s: float = 30e-6
    """As ``expert_overhead_s``, of such weights."""
    w4_expert_depth_s: float = 2e-9
    """As ``expert_depth_s``, of such weights."""
    w4_expert_each_overhead_s: float = 0.1e-6
    """As ``expert_each_overhead_s``, of such weights."""
    kv_efficiency: float = 0.9
    """Share of the memory bandwidth achieved by decode attention that reads KV of grouped queries."""
    kv8_efficiency: float = 0.8
    """The same, of KV in 8 bits."""
    mha_efficiency: float = 0.9
    """Share of the memory bandwidth achieved by decode attention with as many KV heads as query heads."""
    mha8_efficiency: float = 0.8
    """The same, of KV in 8 bits."""
    latent_efficiency: float = 0.67
    """Share of the memory bandwidth achieved by decode attention that reads latents."""
    latent_flops_efficiency: float = 0.5
    """Share of the bf16 matrix rate achieved by decode attention over latents, whose products are many for each byte."""
    attention_overhead_s: float = 12e-6
    """Start and drain of the attention of one layer."""
    kv8_overhead_s: float = 13e-6
    """The same, of KV in 8 bits."""
    latent_overhead_s: float = 15e-6
    """The same, of latent attention."""
    attention_head_overhead_s: float = 2e-9
    """Seconds of decode attention for each request and KV head, whatever the context."""
    attention_efficiency: float = 0.6
    """Share of the bf16 matrix rate achieved by prefill attention."""
    mha_attention_efficiency: float = 0.6
    """The same, with as many KV heads as query heads."""
    latent_attention_efficiency: float = 0.55
    """The same, of latent attention."""
    prompt_memory_efficiency: float = 0.4
    """Share of the memory bandwidth achieved by prefill attention on queries, keys, values and what comes out."""
    mha_prompt_memory_efficiency: float = 0.35
    """The same, with as many KV heads as query heads."""
    latent_prompt_memory_efficiency: float = 0.4
    """The same, of latent attention."""
    prompt_overhead_s: float = 12e-6
    """Start and drain of the attention of one layer that has prompts."""
    kernel_overhead_s: float = 2e-6
    """Start and drain of an elementwise kernel inside a graph or a full launch queue."""
    graph_gap_s: float = 0.5e-6
    """Pause between two kernels of a captured graph: 3.4 us a kernel of 2.9 us on a V100 (NVIDIA, "Getting Started with CUDA
    Graphs", 2019)."""
    link_latency_s: float = 8e-6
    """Latency of a collective or a transfer, whatever its size."""
    link_efficiency: float = 1.0
    """Share of the link bandwidth achieved by collectives."""
    plain_links: bool = False
    """Whether the two above were said of a machine, so that they hold for its collectives in place of what follows."""
    pair_efficiency: float = 0.0
    """Share of the link bandwidth achieved by an all-reduce of two GPUs that read each other's message."""
    one_shot_efficiency: float = 0.0
    """The same of more, each of which reads the messages of all others."""
    two_shot_efficiency: float = 0.0
    """The same of those that add up a part each and then read the other parts."""
    one_shot_overhead_s: float = 0.0
    two_shot_overhead_s: float = 0.0
    """Start and end of these."""
    peer_overhead_s: float = 0.0
    """Seconds of them for each other GPU."""
    one_shot_most_bytes: float = 262144.0
    """Messages from which parts are added up between more than four GPUs; between fewer twice as many."""
    shots_most_bytes: float = 0.0
    """Messages from which all-reduces go through NCCL's ring."""
    ring_efficiency: float = 0.0
    """Share of the link bandwidth achieved by NCCL's ring of two GPUs with large messages; 0: nobody knows, collectives take
    ``link_latency_s`` and their bytes."""
    ring4_efficiency: float = 0.0
    """The same of four; 0: as of two."""
    ring8_efficiency: float = 0.0
    """The same of eight; 0: as of four."""
    ring_small_efficiency: float = 1.0
    """Share of these achieved with small messages."""
    ring_overhead_s: float = 0.0
    ring_large_overhead_s: float = 0.0
    """Start and end of the ring with small and with large messages."""
    ring_hop_overhead_s: float = 0.0
    """Seconds of the ring for each hop."""
    far_efficiency: float = 0.0
    """Share of the link bandwidth achieved by all-reduces of up to eight GPUs of several nodes that NVLink joins; 0: nobody
    knows, or not joined: they go through ``node_link_bandwidth``."""
    far_overhead_s: float = 0.0
    """Start and end of these."""
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
    family: str = ""
    """Architecture, as in ``hopper``: what is known of one GPU of it says something of the others. Empty: not known."""
    engines: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    """What operators achieve under an engine whose kernels differ much from the others': fields of this class by engine."""

    def under(self, engine: str) -> GPU:
        """The GPU as an engine's kernels use it; ``engine`` is a preset's name (``vllm-0.33.0``)."""
        return dataclasses.replace(self, **self.engines.get(engine.partition("-")[0], {}))  # type: ignore[arg-type]

    def product_rates(self, dtype: str, weight_bytes: float) -> ProductRates:
        """Look up what matrix products in a dtype achieve: those in 16 bits, in 8 or in fp4, whatever the hardware has.

        FP8 with scales for parts of a matrix (more than a byte a weight) may have rates of its own, as have weights of less
        than a byte that are multiplied in 16 bits in grouped products.
        """
        peak = self.flops_for(dtype)
        form = "" if peak <= self.bf16_flops else "fp4_" if dtype == "fp4" else "fp8_"
        grouped = f"{form or ('w4_' if weight_bytes < 1 else '')}expert_"
        if form == "fp8_" and weight_bytes > 1:
            grouped = "block_expert_" if self.block_expert_efficiency else grouped
            form = "block_" if self.block_efficiency else form
        plain = ("compute_efficiency", "memory_efficiency", "product_overhead_s", "product_depth_s")
        others = tuple(f"{form}{name}" for name in ("efficiency", "memory_efficiency", "overhead_s", "depth_s"))
        compute, memory, overhead_s, depth_s = (getattr(self, name) for name in (others if form else plain))
        return ProductRates(
            peak * compute,
            self.memory_bandwidth * memory,
            overhead_s,
            depth_s,
            peak * getattr(self, f"{grouped}efficiency"),
            self.memory_bandwidth * getattr(self, f"{grouped}memory_efficiency"),
            self.memory_bandwidth * getattr(self, f"{grouped}activation_efficiency"),
            getattr(self, f"{grouped}overhead_s"),
            getattr(self, f"{grouped}depth_s"),
            getattr(self, f"{grouped}each_overhead_s"),
        )

    def flops_for(self, dtype: str) -> float:
        """Look up the peak FLOP/s of matrix products with weights of a dtype.

        Weights of a dtype that the hardware has no units for are converted to bf16 on the way; so are those in fp4 where
        there are units for fp8 (vLLM: ``MarlinNvFp4LinearKernel`` of model_executor/kernels/linear/nvfp4/marlin.py).
        """
        native = {
            "fp8": self.fp8_flops,
            "fp4": self.fp4_flops,
            "int8": self.int8_flops,
            "fp32": self.fp32_flops,
        }
        return native.get(dtype, 0.0) or self.bf16_flops

    @cached_property
    def link(self) -> Link:
        """What a collective between GPUs of a node achieves."""
        return Link(self.link_bandwidth * self.link_efficiency, self.link_latency_s)

    @property
    def kernels_known(self) -> bool:
        """Whether it is known what kernels of collectives achieve between GPUs of a node, and nobody said otherwise."""
        return self.ring_efficiency > 0 and not self.plain_links

    @cached_property
    def node_link(self) -> Link:
        """What a collective between GPUs of several nodes achieves."""
        return Link(self.node_link_bandwidth, self.node_link_latency_s)

    @property
    def shares_directions(self) -> bool:
        """Whether what GPUs of a node send each other goes through the host, where both directions share the way.

        Peers over PCIe have 55 GB/s one way and 111 both ways (RTX PRO 6000, github.com/voipmonitor/rtx6kpro); without peer
        access it is 22 one way and 30 both ways together (PCIe 4.0, github.com/NVIDIA/nccl/issues/814). A link over PCIe
        that achieves less than half of its bandwidth is taken for one of that sort.
        """
        return self.pcie_link and self.link.bandwidth < self.host_bandwidth / 2

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
            "plain_links": True if link is not None or link_latency_s is not None else None,
            "node_link_bandwidth": node_link,
            "node_link_latency_s": node_link_latency_s,
            "far_efficiency": None if node_link is node_link_latency_s is None else 0.0,
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
        hint = (
            f"nearest: {', '.join(near)}" if near else f"workbench catalogue lists the {len(catalogue)} that there are"
        )
        raise CatalogueError(f"unknown GPU {name!r}; {hint} (or a TOML file)")
    return _gpu({"name": key, **catalogue[key]}, CATALOGUE.name)


def achieved_from(gpu: GPU) -> str:
    """Say where the shares of the peaks come from that operators achieve on a GPU."""
    path = Path(gpu.source)
    values = read_toml(path, CatalogueError) if path.suffix == ".toml" else _catalogue().get(gpu.name, {})
    if any(key in values for key in (LIKE, FORMER_LIKE)):
        return f"those of {values.get(LIKE, values.get(FORMER_LIKE))}"
    if gpu.name in read_toml(EFFICIENCIES) and path.suffix != ".toml":
        return "fitted to published operator tables of it"
    return "of its file" if path.suffix == ".toml" else "estimated"


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
    known = {one.name: one for one in dataclasses.fields(GPU)}
    values = _without_units(values, where)
    if {"link_efficiency", "link_latency_s"} & values.keys() and "ring_efficiency" not in values:
        values = {"plain_links": True} | values
    if FORMER_LIKE in values and LIKE in values:
        raise CatalogueError(f"{where}: {FORMER_LIKE}: given twice; it is called {LIKE}")
    for key in {LIKE, FORMER_LIKE} & values.keys():
        relative = values[key]
        if not isinstance(relative, str) or relative not in _catalogue():
            raise CatalogueError(f"{where}: {key}: {relative!r} is not a GPU of the catalogue")
        like = load_gpu(relative)
        own = {*values, *(("far_efficiency",) if NODE_LINK & values.keys() else ())}
        achieved: dict[str, Any] = {
            name: getattr(like, name)
            for name, one in known.items()
            if _is_achieved(name) and getattr(like, name) != one.default and name not in own
        }
        achieved["engines"] = {
            engine: {name: value for name, value in of.items() if name not in own}
            for engine, of in like.engines.items()
        }
        values = achieved | {name: value for name, value in values.items() if name != key}
    engines = values.get("engines", {})
    if not isinstance(engines, dict) or not all(isinstance(of, dict) for of in engines.values()):
        raise CatalogueError(f"{where}: engines: give a table for each engine, as in [engines.vllm]")
    for engine, of in engines.items():
        for name in of:
            if name not in known or not _is_achieved(name):
                raise CatalogueError(f"{where}: engines.{engine}.{name}: no field that engines differ in")
        _check_numbers(of, f"{where}: engines.{engine}")
    for name in values:
        if name not in known:
            raise CatalogueError(f"{where}: {name}: no such field")
    for name, one in known.items():
        if one.default is one.default_factory is dataclasses.MISSING and not values.get(name):
            raise CatalogueError(f"{where}: {name}: missing")
    _check_numbers(
        {name: value for name, value in values.items() if name not in ("name", "source", "family", "engines")}, where
    )
    if not isinstance(values.get("family", ""), str):
        raise CatalogueError(f"{where}: family: {values['family']!r} is not a text")
    return GPU(**values)


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raise :class:`CatalogueError` for a field of a GPU that is not of its kind."""
    for name, value in values.items():
        if name in ("pcie_link", "plain_links"):
            if not isinstance(value, bool):
                raise CatalogueError(f"{where}: {name}: {value!r} is not true or false")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CatalogueError(f"{where}: {name}: {value!r} is not a number of 0 or more")
        if name.endswith("_efficiency") and not 0 < value <= 1:
            raise CatalogueError(f"{where}: {name}: {value} is not between 0 and 1")


def _without_units(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a GPU, with what keys of :data:`WITH_UNITS` say in their places."""
    found = {name: value for name, value in values.items() if name not in WITH_UNITS}
    for key, (name, parse) in WITH_UNITS.items():
        if key not in values:
            continue
        try:
            said = {name: parse(values[key])}
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
    return field.endswith(("_efficiency", "_overhead_s", "_depth_s", "_most_bytes")) or field in (
        "link_latency_s",
        "plain_links",
    )


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    fitted = read_toml(EFFICIENCIES)
    return {name: {**fitted.get(name, {}), **values} for name, values in read_toml(CATALOGUE).items()}
