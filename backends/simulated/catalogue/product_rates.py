"""What matrix products achieve on a GPU, in one format of weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductRates:
    """What matrix products in one format achieve."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s."""
    overhead_s: float
    """Seconds of a product."""
    depth_s: float
    """Seconds of a row of its weights."""
    expert_flops: float
    """FLOP/s of the grouped products of routed experts."""
    expert_bandwidth: float
    """Bytes/s of their weights."""
    expert_activation_bandwidth: float
    """Bytes/s of what goes in and out of them."""
    expert_overhead_s: float
    """Seconds of a layer's."""
    expert_depth_s: float
    """Seconds of a row of an expert's weights."""
    expert_each_s: float
    """Seconds of an expert that has tokens."""
