"""The links that an instance's GPUs work together over: the machine's, and what is assumed where nobody said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.communication import reached_link
from ground.errors import InputError
from ground.link import Link, parse_latency, parse_rate, written_rate, written_time

LINKS = "links: "
"""How notes about them begin."""


class LinkError(InputError):
    """GPUs that cannot be spread over machines as asked, in one line."""


def in_machine(gpu: GPU, said: Mapping[str, str | None], gpus_per_node: int | None) -> GPU:
    """The GPU in a machine with the links that were ``said``, by the flags' names, each a text with its unit or None."""
    rates = {name: parse_rate(said[name]) for name in ("link", "node_link") if said.get(name) is not None}
    times = {
        f"{name}_s": parse_latency(said[name])
        for name in ("link_latency", "node_link_latency")
        if said.get(name) is not None
    }
    return gpu.with_links(**rates, **times, gpus_per_node=gpus_per_node)


def spread(gpu: GPU, tp: int, together: int, nodes: int | None) -> GPU:
    """The GPU with as many of ``together`` on each node as there will be: over ``nodes``, or as few as can be.

    Ranks of a tensor-parallel group are next to each other, on one node or on as many GPUs of each of several. Raises
    LinkError where they cannot be spread so.
    """
    if nodes is None:
        nodes = next(
            n for n in range(-(-together // gpu.gpus_per_node), together + 1) if _even(tp, together, n) or n == together
        )
    if nodes > together or not _even(tp, together, nodes):
        raise LinkError(f"nodes: {together} GPUs that work together, tp {tp}, do not spread evenly over {nodes}")
    if together // nodes > gpu.gpus_per_node:
        raise LinkError(
            f"nodes: {together} GPUs over {nodes} are {together // nodes} on each, and a machine has "
            f"{gpu.gpus_per_node} (gpus_per_node)"
        )
    return gpu if nodes == 1 else replace(gpu, gpus_per_node=together // nodes)


def _even(tp: int, together: int, nodes: int) -> bool:
    each, rest = divmod(together, nodes)
    return not rest and (each % tp == 0 or tp % each == 0)


def link_notes(gpu: GPU, layout: str, together: int, said: Mapping[str, str | None]) -> list[str]:
    """What is assumed of the links of ``together`` GPUs, a sentence each; ``layout`` says why they work together."""
    notes = []
    nodes = -(-together // gpu.gpus_per_node)
    if gpu.pcie_link and gpu.gpus_per_node > 1 and (assumed := _assumed(reached_link(together, gpu), "link", said)):
        where = ", as on the machine that published tables were measured on" if gpu.kernels_known else ""
        notes.append(
            f"{LINKS}{gpu.name} GPUs are taken to reach each other over PCIe, without NVLink, at {assumed}{where}, which "
            f"every step of {layout} waits for; machines with the same card differ by three times: --link and "
            "--link-latency say yours, calibrate --links measures it"
        )
    if nodes > 1 and (assumed := _assumed(gpu.node_link, "node_link", said)):
        notes.append(
            f"{LINKS}{layout} spreads over {nodes} nodes of {gpu.gpus_per_node} GPUs, which are taken to reach those of "
            f"other nodes at {assumed} each; every step waits for it: --node-link and --node-link-latency say yours"
        )
    return notes


def _assumed(link: Link, name: str, said: Mapping[str, str | None]) -> str:
    """The parts of a link that nobody said, in words; nothing where all are said."""
    parts = [
        text
        for key, text in ((name, written_rate(link.bandwidth)), (f"{name}_latency", written_time(link.latency_s)))
        if said.get(key) is None
    ]
    return " and ".join(parts)
