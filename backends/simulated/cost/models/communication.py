"""Collectives between GPUs: inside a node and, beyond its GPUs, between nodes.

Inside a node they are the kernels of ``collective_kernels.py`` where these were measured (:attr:`GPU.kernels_known`); over
links that were said, and between nodes, a latency and the bytes over the link.

GPUs are numbered node by node, the ranks of a tensor-parallel group next to each other. Where a group is larger than a node,
it has as many GPUs on each, and collectives are hierarchical: the nodes' own links carry the message between the GPUs of a
node, and each GPU exchanges its part of it with its peers on the other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.checkpoint.layer_kinds import Attention, Mixer
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.collective_kernels import (
    FAR_GPUS,
    all_reduce_kernel_s,
    far_all_reduce_s,
    gather_kernel_s,
)
from ground.link import Link

ACTIVATION_BYTES = 2
"""Of one element of a hidden state: activations are in 16 bits, whatever the weights are in."""
LARGE_BYTES = 2**26
"""A message so large that how long a collective takes to start hardly counts."""


def all_reduce_s(message_bytes: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-reduce. Over links that were said: 2 (n-1)/n of the message through each (Thakur et al. 2005), and
    one latency.

    Over nodes: reduce-scatter in each, ring all-reduce of each GPU's part between them, all-gather in each (the hierarchical
    scheme of Horovod and NCCL).
    """
    if gpus == 1:
        return 0.0
    inside, nodes = _spread(gpus, gpu)
    if nodes == 1 and gpu.kernels_known:
        return all_reduce_kernel_s(message_bytes, gpus, gpu)
    if gpu.far_efficiency and gpus <= FAR_GPUS and not gpu.plain_links:
        return far_all_reduce_s(message_bytes, gpus, gpu)
    seconds = 0.0
    if inside > 1:
        part = (inside - 1) / inside * message_bytes
        seconds += 2 * gather_kernel_s(part, inside, gpu) if gpu.kernels_known else gpu.link.seconds(2 * part)
    if nodes > 1:
        seconds += gpu.node_link.seconds(2 * (nodes - 1) / nodes * message_bytes / inside)
    return seconds


def reached_link(gpus: int, gpu: GPU) -> Link:
    """The link that an all-reduce between so many GPUs of a node behaves like: its time without a byte, and the bandwidth
    of the ring's volume of a large message (the bus bandwidth that nccl-tests print), to three digits."""
    inside, _ = _spread(gpus, gpu)
    if inside == 1 or not gpu.kernels_known:
        return gpu.link
    latency_s = all_reduce_kernel_s(0, inside, gpu)
    large_s = all_reduce_kernel_s(LARGE_BYTES, inside, gpu) - latency_s
    return Link(float(f"{2 * (inside - 1) / inside * LARGE_BYTES / large_s:.3g}"), float(f"{latency_s:.3g}"))


def all_gather_s(message_bytes: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-gather after which every GPU has ``message_bytes``, or of a reduce-scatter of as much: (n-1)/n of it
    through each link. Over nodes each GPU first gathers from its peers on the other nodes."""
    if gpus == 1:
        return 0.0
    inside, nodes = _spread(gpus, gpu)
    seconds = 0.0
    if nodes > 1:
        seconds += gpu.node_link.seconds((nodes - 1) / nodes * message_bytes / inside)
    if inside > 1:
        seconds += _taken_in_s((inside - 1) / inside * message_bytes, inside, gpu)
    return seconds


def uneven_all_gather_s(parts_bytes: Sequence[float], gpu: GPU) -> float:
    """Seconds of an all-gather of parts of these sizes, one a GPU, or of a reduce-scatter into them.

    Each GPU takes in what the others have, and the one with the least takes longest. Where directions share the way
    (:attr:`GPU.shares_directions`), a link's bandwidth is what each GPU has while all send: the time is then that of the
    traffic of all over the links of all.
    """
    gpus, whole = len(parts_bytes), sum(parts_bytes)
    if gpus == 1:
        return 0.0
    if gpus > gpu.gpus_per_node:
        return all_gather_s(max(parts_bytes) * gpus, gpus, gpu)
    share = whole / gpus if gpu.shares_directions else min(parts_bytes)
    return _taken_in_s(whole - share, gpus, gpu)


def all_to_all_s(message_bytes: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-to-all in which every GPU sends ``message_bytes`` in all, evenly: (n-1)/n of it leaves, what goes to
    other nodes at the same time as what goes to the same one."""
    if gpus == 1:
        return 0.0
    inside, nodes = _spread(gpus, gpu)
    near_s = gpu.link_latency_s + (inside - 1) / gpus * message_bytes / gpu.link.bandwidth if inside > 1 else 0.0
    far_s = gpu.node_link.seconds((gpus - inside) / gpus * message_bytes) if nodes > 1 else 0.0
    return max(near_s, far_s)


def norms_s(mixer: Mixer, tokens: int, tp: int, gpu: GPU, reduce_s: Callable[[float], float]) -> float:
    """Seconds that a layer's norms of queries and keys over all heads take for being shared by ``tp`` GPUs; ``reduce_s``:
    what an all-reduce of so many bytes takes.

    MiniMax-M2: one all-reduce of two fp32 sums a token (MiniMaxText01RMSNormTP.forward_qk of vLLM 0.19). OLMo 2: all-gathers
    of the queries and of the keys (olmo2.py there, ``_apply_qk_norm``).
    """
    if tp == 1 or not isinstance(mixer, Attention) or mixer.normed_over_all is None:
        return 0.0
    if mixer.normed_over_all == "sums":
        return reduce_s(2 * 4 * tokens)
    row_bytes = tokens * mixer.head_dim * ACTIVATION_BYTES
    return all_gather_s(row_bytes * mixer.heads, tp, gpu) + all_gather_s(row_bytes * max(mixer.kv_heads, tp), tp, gpu)


def next_stage_s(tokens: int, hidden: int, tp: int, gpu: GPU, stage: int = 0) -> float:
    """Seconds to send the hidden states and residuals of ``tokens`` from a pipeline stage to the next, each of ``tp`` ranks
    its part of them: between nodes where the next stage begins one."""
    message_bytes = 2 * tokens * hidden * ACTIVATION_BYTES / tp
    apart = stage * tp // gpu.gpus_per_node != (stage + 1) * tp // gpu.gpus_per_node
    return (gpu.node_link if apart else gpu.link).seconds(message_bytes)


def _taken_in_s(taken_in: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-gather in a node in which a GPU takes in so many bytes, or of a reduce-scatter."""
    return gather_kernel_s(taken_in, gpus, gpu) if gpu.kernels_known else gpu.link.seconds(taken_in)


def _spread(gpus: int, gpu: GPU) -> tuple[int, int]:
    """(GPUs on each node, nodes) of a group."""
    inside = min(gpus, gpu.gpus_per_node)
    return inside, -(-gpus // inside)
