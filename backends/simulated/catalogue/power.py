"""What a GPU draws, as its file says or as shares of the most it may draw."""

from __future__ import annotations

from backends.simulated.catalogue.gpu_specs import GPU

POWER_SHARES = {"idle": 0.12, "prefill": 0.9, "decode": 0.6}
"""Shares of the TDP that are assumed where a GPU's file does not say what it draws: large products need nearly all of it,
steps that stream weights and KV leave the matrix units waiting."""


def power_w(gpu: GPU) -> dict[str, float] | None:
    """What a GPU draws, W, by what it does; None where neither its TDP nor all of that is known."""
    said = {what: float(getattr(gpu, f"{what}_w")) for what in POWER_SHARES}
    if not gpu.tdp_w and not all(said.values()):
        return None
    return {what: said[what] or round(share * gpu.tdp_w, 3) for what, share in POWER_SHARES.items()}
