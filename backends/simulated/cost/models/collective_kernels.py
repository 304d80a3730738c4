"""Kernels of collectives between GPUs of a node: what each takes, and which of them engines choose.

*One-shot*: every GPU reads the messages of all others and adds them up: one round over ``n - 1`` messages. *Two-shot*:
every GPU adds up its part of all messages, then reads the other parts: ``2 (n-1)/n`` of a message in two rounds. Both are
kernels over peers' memory (``csrc/custom_all_reduce.cuh`` of vLLM, which SGLang took over). *Ring* (NCCL): as many bytes
as two-shot, in ``2 (n-1)`` hops of which each waits for the one before (Thakur, Rabenseifner and Gropp, 2005, section 4).
NCCL has protocols for small messages, whose bytes carry flags and reach less of the bandwidth, and one for large ones,
which takes longer to start; it takes the quicker by its own estimate of latency and bandwidth (``src/graph/tuning.cc``).

Engines choose by the size of a message, not by what would be quickest: one-shot between two GPUs, and below 512 KiB
between up to four, 256 KiB between more (``custom_all_reduce.cuh``, ``allreduce``); the ring from a size on that differs
by version and GPU (``CUSTOM_ALL_REDUCE_MAX_SIZES`` and ``SYMM_MEM_ALL_REDUCE_MAX_SIZES`` of ``all_reduce_utils.py``, vLLM
0.24), and always where more than two GPUs have PCIe alone (``custom_all_reduce.py``: not supported there). Later kernels
have other sizes, so both are fitted like the rest (``benchmarks/board/collective_kinds.py``). Kernels over symmetric
memory, which vLLM has between two-shot and ring, count as two-shot.

Numbers are in seconds and bytes/s; messages and numbers of GPUs may be arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU

Numbers = Any
"""A float or an array of floats."""
FAR_GPUS = 8
"""Most GPUs of several nodes whose all-reduces were measured to be of one start: kernels over symmetric memory (vLLM: up to
eight, ``symm_mem.py``), or NCCL's (SGLang)."""


@dataclass(frozen=True)
class Shots:
    """What kernels over peers' memory reach."""

    pair_bandwidth: float
    """Of one-shot between two GPUs."""
    one_shot_bandwidth: float
    """Of one-shot between more."""
    two_shot_bandwidth: float
    one_shot_s: float
    two_shot_s: float
    """Start and end."""
    peer_s: float
    """For each other GPU, of both."""
    one_shot_most_bytes: float
    """From these on it is two-shot between more than four GPUs, from twice as many between three and four."""

    @classmethod
    def of(cls, gpu: GPU) -> Shots:
        """Return those of a GPU."""
        link = gpu.link_bandwidth
        return cls(
            link * gpu.pair_efficiency,
            link * gpu.one_shot_efficiency or np.inf,  # of pairs alone, where more take the ring
            link * gpu.two_shot_efficiency or np.inf,
            gpu.one_shot_overhead_s,
            gpu.two_shot_overhead_s,
            gpu.peer_overhead_s,
            gpu.one_shot_most_bytes,
        )

    def seconds(self, message: Numbers, gpus: Numbers) -> Numbers:
        """Seconds of an all-reduce of ``message`` bytes."""
        others = gpus - 1
        pair = gpus == 2
        reached = np.where(pair, self.pair_bandwidth, self.one_shot_bandwidth)
        one_shot = self.one_shot_s + others * (self.peer_s + message / reached)
        two_shot = self.two_shot_s + others * (self.peer_s + 2 / gpus * message / self.two_shot_bandwidth)
        most = np.where(gpus > 4, self.one_shot_most_bytes, 2 * self.one_shot_most_bytes)
        return np.where(pair | (message < most), one_shot, two_shot)


@dataclass(frozen=True)
class Ring:
    """What NCCL's ring reaches."""

    pair_bandwidth: float
    """Of two GPUs, for large messages."""
    four_bandwidth: float
    eight_bandwidth: float
    small_share: float
    """Of these in the protocols for small messages."""
    small_s: float
    large_s: float
    """Start and end, in the protocols for small messages and in that for large ones."""
    hop_s: float

    @classmethod
    def of(cls, gpu: GPU) -> Ring:
        """Return that of a GPU."""
        link, four = gpu.link_bandwidth, gpu.ring4_efficiency or gpu.ring_efficiency
        return cls(
            link * gpu.ring_efficiency,
            link * four,
            link * (gpu.ring8_efficiency or four),
            gpu.ring_small_efficiency,
            gpu.ring_overhead_s,
            gpu.ring_large_overhead_s,
            gpu.ring_hop_overhead_s,
        )

    def seconds(self, through: Numbers, hops: Numbers, gpus: Numbers) -> Numbers:
        """Seconds of ``hops`` one after the other, in which ``through`` bytes go through each link."""
        # Straight lines over the logarithm of the GPUs, between two and four and between four and eight.
        place = np.clip(np.log2(gpus), 1, 3)
        seconds = [1 / self.pair_bandwidth, 1 / self.four_bandwidth, 1 / self.eight_bandwidth]
        low, high = np.maximum(2 - place, 0), np.maximum(place - 2, 0)
        byte_s = low * seconds[0] + (1 - low - high) * seconds[1] + high * seconds[2]
        small = self.small_s + through * byte_s / self.small_share
        return hops * self.hop_s + np.minimum(small, self.large_s + through * byte_s)


def all_reduce_kernel_s(message: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-reduce inside a node, by the kernel that engines choose."""
    known = gpu.pair_efficiency if gpus == 2 else min(gpu.one_shot_efficiency, gpu.two_shot_efficiency)
    if known and takes_shots(gpus, gpu) and message < gpu.shots_most_bytes:
        return float(Shots.of(gpu).seconds(message, gpus))
    return float(Ring.of(gpu).seconds(2 * (gpus - 1) / gpus * message, 2 * (gpus - 1), gpus))


def far_all_reduce_s(message: Numbers, gpus: Numbers, gpu: GPU) -> Numbers:
    """Seconds of an all-reduce of GPUs of several nodes that NVLink joins: a start, and 2 (n-1)/n of the message."""
    return gpu.far_overhead_s + 2 * (gpus - 1) / gpus * message / (gpu.link_bandwidth * gpu.far_efficiency)


def gather_kernel_s(taken_in: float, gpus: int, gpu: GPU) -> float:
    """Seconds of an all-gather in which a GPU takes in so many bytes, or of a reduce-scatter in which it sends them."""
    return float(Ring.of(gpu).seconds(taken_in, gpus - 1, gpus))


def takes_shots(gpus: int, gpu: GPU) -> bool:
    """Tell whether engines reduce in kernels over peers' memory between so many GPUs."""
    return gpus == 2 or not gpu.pcie_link
