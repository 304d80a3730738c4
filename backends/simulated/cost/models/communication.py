"""Collectives inside a node, as latency plus bytes over the link."""

from __future__ import annotations

from backends.simulated.catalogue.gpu_specs import GPU

ACTIVATION_BYTES = 2
"""Of one element of a hidden state: activations are in 16 bits, whatever the weights are in."""


def all_reduce_s(message_bytes: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-reduce. Ring volume, 2 (n-1)/n of the message through each link (Thakur et al. 2005), and one
    latency: the engines use one-shot kernels where the ring's many latencies would count."""
    if gpus == 1:
        return 0.0
    return gpu.link_latency_s + 2 * (gpus - 1) / gpus * message_bytes / _rate(gpu)


def all_to_all_s(message_bytes: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-to-all in which every GPU sends ``message_bytes`` in all, evenly: (n-1)/n of it leaves."""
    if gpus == 1:
        return 0.0
    return gpu.link_latency_s + (gpus - 1) / gpus * message_bytes / _rate(gpu)


def next_stage_s(tokens: int, hidden: int, tp: int, gpu: GPU) -> float:
    """Seconds to send the hidden states and residuals of ``tokens`` to the next pipeline stage, each of ``tp`` ranks its
    part of them."""
    message_bytes = 2 * tokens * hidden * ACTIVATION_BYTES / tp
    return gpu.link_latency_s + message_bytes / _rate(gpu)


def _rate(gpu: GPU) -> float:
    """Bytes/s."""
    return gpu.link_bandwidth * gpu.link_efficiency
